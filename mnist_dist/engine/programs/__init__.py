"""The compiled programs."""
