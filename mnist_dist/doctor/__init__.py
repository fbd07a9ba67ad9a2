"""The command that tells whether an environment fits together, before anything is trained in it."""
