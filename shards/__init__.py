"""The engine: schema, index kinds, shard, wire and server. Imports nothing else of ours."""
