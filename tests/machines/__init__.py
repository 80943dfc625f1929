"""Real machines: starts and ends of `serve`, kills, limits; run by `make test-machines`."""
