"""The keys of `python -m mnist_dist.verify`: those of `train`, and how thorough to be."""

from dataclasses import dataclass

from omegaconf import MISSING

from mnist_dist.config.rules import check, ruled, timeout_s
from mnist_dist.config.train import TrainConfig
from mnist_dist.verify.report import CHECK_NAMES


@dataclass
class VerifyConfig(TrainConfig):
    """All keys of `python -m mnist_dist.verify`."""

    checks: list[str] | None = None
    """Which checks; by default all. Those before them that they build on are not added."""
    budget_s: float | None = ruled(
        lambda value: value is None or value > 0, "must be more than 0 seconds, or null", default=None
    )
    """Less than the 60 seconds that all take: proportionally fewer repeats, so that less is found. No limit."""
    deadline_s: float = timeout_s()
    """Seconds after which a check that has not ended has failed."""
    reference: str | None = None
    """An earlier `verify.json`, or a folder of them or of run folders: is this one slower?"""
    strict: bool = MISSING
    """Whether DEGRADED is exit code 1 too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.checks or ():
            check(name in CHECK_NAMES, "checks", name, f"no such check; the checks are {', '.join(CHECK_NAMES)}")
        check(self.checks is None or len(self.checks) > 0, "checks", self.checks, "name at least one, or give null")
