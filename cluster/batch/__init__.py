"""Batch retrieval jobs: many queries, answered from a generation's files or by a live cluster"""
