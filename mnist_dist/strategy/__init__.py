"""Placement and collectives: one interface (`base.Strategy`), one implementation a backend."""

from mnist_dist.strategy.base import SingleDevice, Strategy

__all__ = ["Strategy", "create_strategy"]


def create_strategy() -> Strategy:
    """The strategy of this run."""
    return SingleDevice()
