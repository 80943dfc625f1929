"""Odd tables, made by code, as people's warehouses and notebooks write them."""
