"""The sections of the configuration that training reads."""
