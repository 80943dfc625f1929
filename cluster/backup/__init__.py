"""Snapshots of a generation with its writes, and generations restored from them"""
