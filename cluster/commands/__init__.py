"""The command line's subcommands, one module a stage of the main job."""
