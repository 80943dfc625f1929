"""Tests that start all that they need themselves, so that two of them may run side by side."""
