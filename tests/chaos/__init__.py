"""Chaos: a real cluster under load, faults at random, and an oracle that checks every answer.

``CHAOS_SECONDS=120 CHAOS_SEED=7 make test-chaos``; test_chaos.py says what it asserts.
"""
