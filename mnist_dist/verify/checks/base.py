"""What all checks have in common: every rank measures, rank 0 judges, and each judge is judged too.

Measuring yields JSON values, the evidence; judging is a pure function of the evidence of all ranks. So a fault can be
put into a copy of real evidence, to see that it would have been found (check 1, detectors).
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mnist_dist.verify.context import Context
from mnist_dist.verify.report import CHECK_NAMES, Status

Evidence = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """What a judge says."""

    status: Status
    summary: str
    """One sentence."""
    blamed: dict[int, str] = field(default_factory=dict)
    """Ranks or replicas, each with the evidence in one sentence."""
    details: dict[str, Any] = field(default_factory=dict)
    of: Literal["rank", "replica"] = "rank"
    """What `blamed` counts: processes, or model copies over all processes."""


class Check(ABC):
    """One check; it may only inform."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    """The checks without whose success this one proves nothing."""

    @property
    def number(self) -> int:
        """Its place in the list."""
        return CHECK_NAMES.index(self.name)

    def why_not(self, context: Context) -> str:
        """Why there is nothing to check here; empty if there is."""
        return ""

    @abstractmethod
    def measure(self, context: Context) -> Evidence:
        """This rank's evidence; all ranks call it at once."""

    @abstractmethod
    def judge(self, evidence: Sequence[Evidence]) -> Finding:
        """Judge the evidence of all ranks."""


class Detector(Check):
    """A check that can fail, and is tried in every run."""

    @abstractmethod
    def spoil(self, evidence: Sequence[Evidence]) -> int | None:
        """Put a fault into good evidence, in place; returns the rank that must be blamed for it, if one must."""


def minority(values: Sequence[Hashable]) -> list[int] | None:
    """Positions of the values that differ from what most are; None if there is no majority."""
    common, votes = Counter(values).most_common(1)[0]
    if 2 * votes <= len(values):
        return None
    return [index for index, value in enumerate(values) if value != common]


def by_replica(evidence: Sequence[Evidence], key: str) -> list[Any]:
    """What the ranks list under `key` for each of their replicas, by replica."""
    return [value for one in evidence for value in one[key]]


def names_of(numbers: Iterable[int], kind: Literal["rank", "replica"] = "rank") -> str:
    """Ranks or replicas, in words."""
    found = sorted({*numbers})
    shown = ", ".join(map(str, found[:8]))
    return f"{kind}{'s' if len(found) > 1 else ''} {shown}{' and others' if len(found) > 8 else ''}"
