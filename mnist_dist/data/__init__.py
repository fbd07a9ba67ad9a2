"""Data: where it comes from, how it is prepared, how it is cut into batches."""
