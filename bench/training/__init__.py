"""Training: throughput, losses, mining, published tables."""
