"""Hard negatives: candidates, selection, the mined table."""
