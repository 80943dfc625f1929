"""What changes in a shard while it serves: its state, the rows and deletions written to it."""
