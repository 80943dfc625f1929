"""Query texts to vectors: a process of the router that runs the text encoder."""
