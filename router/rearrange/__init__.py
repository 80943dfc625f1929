"""Caps, boosts and diversity: a pool of the best items put into another order, and cut to k."""
