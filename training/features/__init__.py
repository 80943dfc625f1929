"""Columns to model inputs, fitted once."""
