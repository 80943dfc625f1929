"""Index kinds side by side."""
