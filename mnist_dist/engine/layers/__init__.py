"""Keras layers of ours."""
