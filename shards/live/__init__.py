"""Live writes of a shard: records and their durable log, and the state that they change."""
