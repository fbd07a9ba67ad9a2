"""What every room may use: errors, files, the console, what a process finds around it."""
