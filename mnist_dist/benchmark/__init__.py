"""How fast an epoch is, against Keras, PyTorch, JAX and the bare matrix products: `python -m mnist_dist.benchmark`."""
