"""One query to every shard: connections, shared frames, deadlines, coverage."""
