"""Shardline: sharded two-tower retrieval."""
