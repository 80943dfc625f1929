"""An endpoint under load and under faults; the fan-out alone."""
