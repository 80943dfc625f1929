"""What every part shares: ids, scores, messages, errors, files, metrics, partitioning."""
