"""Load on an endpoint: scenarios, schedules, faults, and figures that hide no failure."""
