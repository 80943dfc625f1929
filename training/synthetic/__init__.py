"""Synthetic data with known ceilings."""
