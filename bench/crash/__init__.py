"""The proof by kills: processes of a shard that is written end at every point, and lose nothing."""
