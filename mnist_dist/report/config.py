"""The keys of `python -m mnist_dist.report`."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from mnist_dist.config.rules import Checked, between, check
from mnist_dist.config.train import ConsoleConfig


def _is_text_or_list(value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return value is None or (values != [] and all(isinstance(one, (str, int)) for one in values))


@dataclass
class ReportConfig(Checked):
    """All keys of `python -m mnist_dist.report`."""

    run_dir: Any = None
    """A run folder, a list of run folders, or a folder of run folders."""
    sweep_dir: str | None = None
    """The folder of a sweep."""
    output: str | None = None
    """The file to write; by default `report.html` in the folder, `comparison.html` for a list of runs."""
    fail_if_worse: float | None = between(0, 1, default=None)
    """How much lower than the first run's the test accuracy of another may be; if one is worse: exit code 1."""
    console: ConsoleConfig = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        words = "must be a run folder, a list of them, or a folder of runs"
        check(_is_text_or_list(self.run_dir), "run_dir", self.run_dir, words)
        which = (self.run_dir is not None) + (self.sweep_dir is not None)
        check(which == 1, "run_dir", self.run_dir, "say what to report on: either run_dir=... or sweep_dir=...")

    @property
    def run_dirs(self) -> list[str]:
        """`run_dir` as a list."""
        return [str(value) for value in (self.run_dir if isinstance(self.run_dir, list) else [self.run_dir])]
