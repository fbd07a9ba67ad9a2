"""Our own Keras layers."""
