"""The command line's subcommands, one module a station of the main job."""
