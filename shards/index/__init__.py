"""faiss indexes: kinds and limits, training, searching, layers."""
