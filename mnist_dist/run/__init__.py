"""The run folder: what is in it, when it may be used, and how a run goes on from it."""
