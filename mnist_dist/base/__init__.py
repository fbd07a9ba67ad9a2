"""What every room may use: errors, files, console, versions, messages over sockets."""
