"""From the command line to a typed configuration, and from errors to exit codes."""
