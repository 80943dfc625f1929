"""A training run: batches, steps, epochs, ranks, its log."""
