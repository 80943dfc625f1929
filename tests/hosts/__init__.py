"""A cluster of several hosts, simulated on this machine."""
