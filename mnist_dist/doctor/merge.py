"""From the findings of all ranks to the rows of one table: what most ranks have, and who differs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mnist_dist.base.errors import UserError
from mnist_dist.doctor.checks.network import check_clocks
from mnist_dist.doctor.finding import Finding, RankReport, Status, from_message, worst
from mnist_dist.launch.agreement import check_not_shared

_MOST_CLOCK_SKEW_S = 2.0
_SAME = "give all ranks the same: one environment and one command line for all nodes"


@dataclass(frozen=True)
class Deviation:
    """A rank that differs from the majority."""

    rank: int
    host: str
    status: Status
    found: str
    fix: str


@dataclass(frozen=True)
class Row:
    """A check, over all ranks."""

    name: str
    status: Status
    """The worst of any rank."""
    found: str
    """What most ranks found."""
    fix: str
    deviations: tuple[Deviation, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def merge(reports: Sequence[RankReport]) -> list[Row]:
    """A row for each check, in order, and those that compare ranks with each other."""
    names = dict.fromkeys(finding.name for report in reports for finding in report.findings)
    rows = [_merge_one([(r, f) for r in reports for f in r.findings if f.name == name]) for name in names]
    if len(reports) > 1:
        for finding in (_compare_gpus(reports), _compare_clocks(reports)):
            rows.append(Row(finding.name, finding.status, finding.found, finding.fix))
    return rows


def _merge_one(found: Sequence[tuple[RankReport, Finding]]) -> Row:
    groups: dict[tuple[Any, ...], list[tuple[RankReport, Finding]]] = {}
    for report, finding in found:
        groups.setdefault((finding.status, *sorted(finding.facts.items())), []).append((report, finding))
    majority = max(groups.values(), key=len)  # with two of one size the one with the lower rank
    _, usual = majority[0]
    deviations = [
        _deviation(report, finding, usual)
        for group in groups.values()
        if group is not majority
        for report, finding in group
    ]
    deviations.sort(key=lambda deviation: deviation.rank)
    status = worst([usual.status, *(deviation.status for deviation in deviations)])
    return Row(usual.name, status, usual.found, usual.fix, tuple(deviations))


def _deviation(report: RankReport, finding: Finding, usual: Finding) -> Deviation:
    keys = [key for key in {**usual.facts, **finding.facts} if usual.facts.get(key) != finding.facts.get(key)]
    differences = ", ".join(f"{key}={finding.facts.get(key)}, not {usual.facts.get(key)}" for key in keys[:4])
    found, fix, status = finding.found, finding.fix, finding.status
    if keys:
        # The worse of two causes says what to do.
        found = f"{differences}; {found}" if status != "ok" else differences
        fix, status = fix or _SAME, worst([status, usual.differing])
    return Deviation(report.rank, report.host, status, found, fix)


def _compare_gpus(reports: Sequence[RankReport]) -> Finding:
    """Whether each rank has GPUs of its own; a GPU's UUID is the same on all ranks that use it."""
    uuids: list[list[str]] = [[] for _ in range(1 + max(report.rank for report in reports))]
    for report in reports:
        for finding in report.findings:
            uuids[report.rank] += finding.details.get("uuids", [])
    try:
        check_not_shared(uuids)
    except UserError as error:
        return from_message("GPUs of all ranks", str(error))
    return Finding("GPUs of all ranks", "ok", "none is used twice" if any(uuids) else "none")


def _compare_clocks(reports: Sequence[RankReport]) -> Finding:
    return check_clocks({report.name: report.clock_s for report in reports}, most_s=_MOST_CLOCK_SKEW_S)
