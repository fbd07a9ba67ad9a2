"""Pages about runs: one run, several compared, a sweep."""
