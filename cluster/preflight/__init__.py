"""What can be known of a machine before Ray starts: each check once, for commands and doctor."""
