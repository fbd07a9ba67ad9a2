"""What the checks found, and the verdict on it: plain values, which `verify.json` holds as they are."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["pass", "fail", "degraded", "inconclusive", "info", "skipped"]
"""info: measured, and there is nothing to judge it by. skipped: not asked for, or its ground is gone. inconclusive: the
measurement itself is in doubt; changes no verdict."""
Verdict = Literal["PASS", "DEGRADED", "FAIL"]

EXPECTED_S = {
    "environment": 7.0,
    "detectors": 0.0,
    "identity": 6.0,
    "collectives": 4.0,
    "data": 2.0,
    "cross_examination": 3.0,
    "exact": 4.0,
    "fast": 4.0,
    "learning": 5.0,
    "precision": 8.0,
    "interruption": 2.0,
    "slow_rank": 5.0,
    "scaling": 10.0,
    "reference": 0.0,
}
"""The checks by number, and about how many seconds each takes with two processes on two cores."""
CHECK_NAMES = tuple(EXPECTED_S)


@dataclass(frozen=True)
class Suspect:
    """A process that a check blames."""

    rank: int
    host: str
    check: str
    evidence: str
    """One sentence."""
    device: str = ""
    """UUID of its GPU; the device's name without one."""


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check."""

    number: int
    """0 to 13."""
    name: str
    status: Status
    summary: str
    """One sentence: what was found."""
    seconds: float = 0.0
    suspects: tuple[Suspect, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    """What was measured, for the page and for later comparisons; JSON values."""


@dataclass(frozen=True)
class RankFacts:
    """Where a rank runs."""

    rank: int
    host: str
    devices: tuple[str, ...]
    """Of its replicas."""
    gpus: tuple[str, ...]
    """UUIDs."""
    cpu: str
    cores: int
    gpu: str = ""
    """The model of its GPUs."""


@dataclass(frozen=True)
class Report:
    """All of it; what `verify.json` holds."""

    verdict: Verdict
    started: str
    """ISO 8601, with the time zone."""
    seconds: float
    command: str
    strategy: str
    num_replicas: int
    dataset: dict[str, Any]
    """name, sha256, num_train."""
    configuration: dict[str, Any]
    """Keys of the training, with each `auto` resolved."""
    versions: dict[str, str]
    ranks: tuple[RankFacts, ...]
    checks: tuple[CheckResult, ...]

    @property
    def suspects(self) -> tuple[Suspect, ...]:
        """Those of all checks."""
        return tuple(suspect for check in self.checks for suspect in check.suspects)

    def to_json(self) -> str:
        """The text of `verify.json`."""
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Read what `to_json` wrote; raises ValueError, KeyError or TypeError for anything else."""
        values = json.loads(text)
        checks = [
            CheckResult(**{**check, "suspects": tuple(Suspect(**suspect) for suspect in check["suspects"])})
            for check in values["checks"]
        ]
        ranks = [
            RankFacts(**{**rank, "devices": tuple(rank["devices"]), "gpus": tuple(rank["gpus"])})
            for rank in values["ranks"]
        ]
        return cls(**{**values, "checks": tuple(checks), "ranks": tuple(ranks)})


def judge(checks: Iterable[CheckResult]) -> Verdict:
    """The verdict: the worst that a check found; what is inconclusive or skipped changes nothing."""
    found = {check.status for check in checks}
    return "FAIL" if "fail" in found else "DEGRADED" if "degraded" in found else "PASS"
