"""The command line's subcommands, one module per stage of the main job."""
