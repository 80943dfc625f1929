"""A generation behind HTTP: checks before, start, end, where it is served."""
