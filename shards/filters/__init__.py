"""Filters on attribute columns: bound to a shard's columns, evaluated to a mask of its rows."""
