"""The checks, one or two closely related ones in a module."""
