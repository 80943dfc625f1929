"""Composition root: configuration, store, generations, placement, controller, command line."""
