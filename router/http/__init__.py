"""The HTTP API: routes, bodies, keys, errors as problem+json."""
