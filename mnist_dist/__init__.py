"""Distributed training of MNIST networks: the same numbers on any number of devices."""

__version__ = "0.1.0"
