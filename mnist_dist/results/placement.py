"""Where and how a training ran."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """The part of `summary.json` that says on what the results were computed."""

    strategy: str
    world_size: int
    """Processes."""
    num_replicas: int
    """Model copies."""
    global_batch_size: int
    per_replica_batch_size: int
    """Examples, at most."""
    precision: str
    reproducibility: str
    num_shards: int
