"""Benchmarks: each prints its set-up, its floor and a named baseline, and ends in JSON."""
