"""The model: data, features, towers, losses, training loop, evaluation, export."""
