"""The table for people, and JSON for programs."""

import json
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from mnist_dist.doctor.finding import STATUSES, RankReport, Status, worst
from mnist_dist.doctor.merge import Deviation, Row

_STYLES: dict[Status, str] = {"ok": "green", "unknown": "cyan", "warning": "bold yellow", "error": "bold red"}
_NAMED_RANKS = 8


def build_table(rows: Sequence[Row]) -> Table:
    """A line for each row, with the ranks that differ and what to do below it."""
    table = Table(show_edge=False, pad_edge=False, box=None)
    for column in ("status", "check", "found"):
        table.add_column(column, overflow="fold")
    for row in rows:
        text = Text(row.found)
        if row.fix:
            text.append(f"\nfix: {row.fix}", style="bold")
        for ranks, deviation in _group(row.deviations):
            text.append(f"\n{ranks}: {deviation.found}", style=_STYLES[deviation.status])
            if deviation.fix:
                text.append(f"\nfix: {deviation.fix}", style="bold")
        table.add_row(Text(row.status, style=_STYLES[row.status]), row.name, text)
    return table


def _group(deviations: Sequence[Deviation]) -> list[tuple[str, Deviation]]:
    """The ranks that differ in the same way, together."""
    groups: dict[tuple[str, str, str], list[Deviation]] = {}
    for one in deviations:
        groups.setdefault((one.status, one.found, one.fix), []).append(one)
    return [(_name(group), group[0]) for group in groups.values()]


def _name(group: Sequence[Deviation]) -> str:
    names = ", ".join(f"rank {one.rank} ({one.host})" for one in group[:_NAMED_RANKS])
    more = f" and {len(group) - _NAMED_RANKS} more" if len(group) > _NAMED_RANKS else ""
    return f"{names}{more}"


def verdict(rows: Sequence[Row]) -> Status:
    """The worst of all rows."""
    return worst([row.status for row in rows])


def summarize(rows: Sequence[Row]) -> str:
    """One line: how many of each."""
    counts = {status: sum(row.status == status for row in rows) for status in reversed(STATUSES)}
    numbers = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
    if counts["error"]:
        return f"{numbers}: a training would fail here; each error has its fix"
    return f"{numbers}: nothing stands in the way of this training"


def to_json(rows: Sequence[Row], reports: Sequence[RankReport]) -> str:
    """All of it."""
    ranks = [{"rank": report.rank, "host": report.host} for report in reports]
    content = {"verdict": verdict(rows), "ranks": ranks, "rows": [row.to_dict() for row in rows]}
    return json.dumps(content, indent=1)
