"""Placement of shards: pure rules, the controller actor, the shard actors."""
