"""Transformer encoders of texts, in numpy: from a folder or an installed package, never fetched."""
