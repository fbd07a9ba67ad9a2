"""Which process this is, and how those of a job meet, agree, watch each other and stop."""
