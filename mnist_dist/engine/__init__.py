"""The training: what is computed, in which order, on which rows."""
