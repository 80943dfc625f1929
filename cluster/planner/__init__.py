"""Capacity on paper: index, shards, hosts, memory, latency and cost for a load to come."""
