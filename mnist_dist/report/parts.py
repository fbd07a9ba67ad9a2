"""Parts that several kinds of pages have."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mnist_dist.report.charts import Chart, draw_chart
from mnist_dist.results.page import Html, Tone, badge, code, facts, link, picture, text, two_scales
from mnist_dist.results.quantities import as_value
from mnist_dist.results.svg import to_svg
from mnist_dist.run.record import RunRecord, RunState

LOOKS: Mapping[RunState, tuple[str, Tone]] = {
    "finished": ("\N{CHECK MARK}", "good"),
    "running": ("\N{BLACK RIGHT-POINTING TRIANGLE}", "info"),
    "stopped": ("\N{BLACK SQUARE}", "warn"),
    "failed": ("\N{MULTIPLICATION X}", "bad"),
    "lost": ("?", "bad"),
}
"""A sign and a tone for what became of a run."""


def state_badge(record: RunRecord) -> Html:
    """What became of a run."""
    return badge(record.state, *LOOKS[record.state])


def chart_picture(chart: Chart, *, name: str, caption: str, both_scales: bool = False) -> Html:
    """A chart whose curves show their values; with `both_scales` the vertical axis can be switched to a logarithm."""
    if not both_scales:
        svg = to_svg(lambda: draw_chart(chart), name=name, title=caption, shows_values=True)
        return picture(svg, caption=caption)
    linear, logarithmic = (
        to_svg(
            partial(draw_chart, replace(chart, log=log)),
            name=f"{name}-{kind}",
            title=f"{caption}, {kind} axis",
            shows_values=True,
        )
        for log, kind in ((False, "linear"), (True, "log"))
    )
    return two_scales(linear, logarithmic, caption=caption, name=name)


def settings(values: Iterable[tuple[str, object]]) -> Html:
    """Keys with their values as a configuration has them."""
    return facts([(key, code(as_value(value))) for key, value in values], kind="many")


def versions_of(records: Sequence[RunRecord]) -> dict[str, Any]:
    """The versions that the newest start of a run has noted, or its summary."""
    for record in records:
        for event in reversed(record.events):
            if isinstance(found := event.facts.get("versions"), Mapping):
                return dict(found)
        if record.summary:
            return dict(record.summary.versions)
    return {}


def or_dash(value: float | None, shown: str) -> Html:
    """A number in this format, or a dash where there is none."""
    return text("\N{EN DASH}" if value is None else shown.format(value))


def linked(name: object, page: Path, *, output: Path) -> Html:
    """A name, as a link to a page where there is one; `output` is the file that the link will stand in."""
    if not page.is_file():
        return text(name)
    return link(name, quote(os.fsencode(os.path.relpath(page.absolute(), output.absolute().parent))))
