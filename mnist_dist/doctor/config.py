"""The keys of `python -m mnist_dist.doctor`: those of `train`, and its own."""

from dataclasses import dataclass

from omegaconf import MISSING

from mnist_dist.config.rules import timeout_s
from mnist_dist.config.train import TrainConfig


@dataclass
class DoctorConfig(TrainConfig):
    """All keys of `python -m mnist_dist.doctor`."""

    json: bool = MISSING
    """Print JSON in place of the table."""
    timeout_s: float = timeout_s()
    """How long a probe may take, seconds; what has not answered by then is killed, and reported."""
