"""Frames between router and shard, and how a connection begins."""
