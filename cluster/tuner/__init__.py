"""``shardline tune``: kinds of index and their parameters, tried on a sample by halving."""
