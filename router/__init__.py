"""A query's home: HTTP API, query encoder, fan-out, merge, client."""
