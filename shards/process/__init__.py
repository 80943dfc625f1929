"""What a shard or router process is made of: actor, memory, exported metrics."""
