"""The keys of `python -m mnist_dist.benchmark`."""

from dataclasses import dataclass

from omegaconf import MISSING

from mnist_dist.config.data import DataConfig
from mnist_dist.config.rules import MAX_INT32, Checked, between, check, one_of, timeout_s


@dataclass
class StartupConfig(Checked):
    """How the start of a training is timed."""

    section = "startup."

    enabled: bool = MISSING
    repeats: int = between(1, MAX_INT32)
    """Number of starts of each kind."""
    cold: str = one_of("fadvise", "drop_caches", "none")
    """fadvise | drop_caches | none: how the file cache is dropped before a cold start."""


@dataclass
class BenchmarkConfig(Checked):
    """All keys of `python -m mnist_dist.benchmark`."""

    run_dir: str | None = None
    """The folder for the results; by default a new one below `runs/`, named by date and time."""
    contenders: list[str] | None = None
    """What is compared; by default all that this machine can run."""
    epochs: int = between(1, MAX_INT32)
    """Epochs that count, per contender."""
    warmup_epochs: int = between(0, MAX_INT32)
    """Epochs before them that do not count."""
    profile: bool = MISSING
    """Also trace one epoch of each training of one process: where the time of a step goes, by operation."""
    targets: bool = MISSING
    """Report whether each target was reached."""
    timeout_s: float = timeout_s()
    """How long a contender may take to start, or for one turn, seconds."""
    startup: StartupConfig = MISSING
    data: DataConfig = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.contenders is None or len(self.contenders) > 0 or self.startup.enabled,
            "contenders",
            self.contenders,
            "nothing is left to measure; name one, or give startup.enabled=true",
        )
