"""One shard behind a socket: sessions, queue, batches, search."""
