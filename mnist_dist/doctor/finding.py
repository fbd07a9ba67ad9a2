"""What a check has found on one process: plain values, which processes send each other and `verify` reads."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "unknown", "warning", "error"]
STATUSES: tuple[Status, ...] = ("ok", "unknown", "warning", "error")
"""From best to worst. unknown: the probe itself gave no answer, or one that cannot be read."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check on one process."""

    name: str
    """The row of the table."""
    status: Status
    found: str
    """In one sentence."""
    fix: str = ""
    """What to type or change; every warning and error has one."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What should be the same on all ranks."""
    differing: Status = "error"
    """What it is if it is not."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """For checks that compare ranks in another way; JSON values."""


@dataclass(frozen=True)
class RankReport:
    """What a rank tells the others."""

    rank: int
    host: str
    findings: tuple[Finding, ...] = ()
    clock_s: float = 0.0
    """Its clock right after the ranks had met."""

    @property
    def name(self) -> str:
        """The rank, in words."""
        return f"rank {self.rank} ({self.host})"

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RankReport":
        """Read what `to_json` wrote."""
        values = json.loads(text)
        return cls(**{**values, "findings": tuple(Finding(**finding) for finding in values["findings"])})


def worst(statuses: list[Status]) -> Status:
    """The worst of them; ok if there are none."""
    return max(statuses, key=STATUSES.index, default="ok")


def from_message(name: str, message: str, *, status: Status = "error", fix: str = "") -> Finding:
    """A finding of a message of the package, which says after a semicolon what to do; else `fix` does."""
    found, _, advice = message.partition("; ")
    return Finding(name, status, found, advice or fix)
