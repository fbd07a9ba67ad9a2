"""What runs in processes of its own, since it may hang or crash: each module's `probe` yields (topic, answer)."""
