"""The two towers, their checkpoints, and vectors of whole tables."""
