"""Real starts of the commands on this machine, one process each; `make test-machines` runs them."""
