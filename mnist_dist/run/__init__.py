"""The run folder: what is in it, when it may be used, and how a run resumes from it."""
