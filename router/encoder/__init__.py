"""The query tower in numpy."""
