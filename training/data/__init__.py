"""Tables of interactions, users and items; importers and splits."""
