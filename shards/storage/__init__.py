"""Embedding sets and generations on disk."""
