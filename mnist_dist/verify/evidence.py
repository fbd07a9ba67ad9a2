"""What a check measured, as parts of its section in `verify.html`: pictures, small tables and lines.

Each view asks for some keys of `CheckResult.details`. A check without them has no such part, and what no view knows is
listed as it is.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mnist_dist.base.memory import describe_bytes
from mnist_dist.results.page import (
    Column,
    Html,
    cell_grid,
    code,
    facts,
    join,
    picture,
    printable,
    remark,
    share_bar,
    side_by_side,
    swatch,
    table,
    text,
)
from mnist_dist.results.quantities import as_title, bytes_text, counted, digits, seconds_text
from mnist_dist.results.svg import to_svg
from mnist_dist.verify.plots import (
    draw_bands,
    draw_bandwidth,
    draw_efficiency,
    draw_losses,
    draw_noise,
    draw_ratios,
    draw_rounds,
    draw_throughput,
)
from mnist_dist.verify.report import CheckResult

MAX_LISTED = 32
"""Replicas that are shown one by one; of more, only those that differ."""

Details = Mapping[str, Any]


@dataclass(frozen=True)
class _View:
    """A way to show some of the details."""

    needs: frozenset[str]
    show: Callable[[Details, str], Iterable[Html]]
    """Takes the details, and what the ids of its pictures begin with."""
    may_use: frozenset[str] = frozenset()


def show_evidence(check: CheckResult) -> list[Html]:
    """Parts of the check's section; none if it has no details."""
    parts: list[Html] = []
    known: set[str] = set()
    for index, view in enumerate(_VIEWS):
        if not view.needs <= check.details.keys():
            continue
        known |= view.needs | view.may_use
        try:
            parts += view.show(check.details, f"check-{check.number}-{index}")
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            # A page without one picture is worth more than none after minutes on a cluster.
            keys = join((code(key) for key in sorted(view.needs)), ", ")
            parts.append(remark(Html(f"Not shown here, see verify.json: {keys}.")))
    rest = {key: value for key, value in check.details.items() if key not in known}
    return parts + _show_rest(rest)


def _show_bandwidth(details: Details, name: str) -> Iterable[Html]:
    transfers = details["transfers"]
    if not transfers:
        return
    smallest = min(transfer["bytes"] for transfer in transfers)
    largest = max(transfer["bytes"] for transfer in transfers)
    columns = [
        Column("Collective"),
        Column(f"Latency, {bytes_text(smallest)}", "number"),
        Column(f"Bandwidth, {bytes_text(largest)}", "number"),
    ]
    rows = []
    for collective in dict.fromkeys(transfer["collective"] for transfer in transfers):
        own = {transfer["bytes"]: transfer for transfer in transfers if transfer["collective"] == collective}
        latency = seconds_text(own[smallest]["seconds"]) if smallest in own else ""
        bandwidth = f"{digits(own[largest]['bus_gb_per_s'])} GB/s" if largest in own else ""
        rows.append([text(cell) for cell in (str(collective).replace("_", "-"), latency, bandwidth)])
    parts = [table(columns, rows, caption="Latency and bandwidth")]
    # Without a second replica nothing is sent, and a logarithm has no zero.
    moved = [transfer for transfer in transfers if transfer["bus_gb_per_s"] > 0]
    if moved:
        title = "Bus bandwidth of each collective by size, both on logarithmic scales"
        parts.insert(0, picture(to_svg(lambda: draw_bandwidth(moved), name=name, title=title), caption="Bus bandwidth"))
    yield side_by_side(parts)


def _show_examples(details: Details, _: str) -> Iterable[Html]:
    examples, once = details["examples"], details["exactly_once"]
    pairs = [("Examples", text(f"{examples:,}")), ("Seen exactly once", text(f"{once:,}"))]
    per_rank = details.get("per_rank") or []
    if 0 < len(per_rank) <= 8:
        pairs += [(f"Rank {rank}", text(f"{number:,}")) for rank, number in enumerate(per_rank)]
    elif per_rank:
        pairs.append((f"Each of {len(per_rank)} ranks", text(f"{min(per_rank):,} to {max(per_rank):,}")))
    yield facts(pairs)
    if once != examples:
        yield remark(text(f"{counted(abs(examples - once), 'example')} not seen exactly once."), "bad")


def _show_digests(details: Details, _: str) -> Iterable[Html]:
    """Replicas against shards; where a digest is not the one of most replicas, the cell stands out."""
    digests: Sequence[Sequence[str]] = details["digests"]
    repeats: Sequence[bool] = details.get("repeats_equal") or [True] * len(digests)
    majorities = [_majority(column) for column in zip(*digests, strict=True)]
    wrong = [
        [digest != most for digest, most in zip(replica, majorities, strict=True)] + [not repeat]
        for replica, repeat in zip(digests, repeats, strict=True)
    ]
    shown = [replica for replica, cells in enumerate(wrong) if len(wrong) <= MAX_LISTED or any(cells)]
    if len(shown) < len(wrong):
        agreeing = len(wrong) - len(shown)
        yield remark(
            text(f"{counted(agreeing, 'replica')} of {len(wrong):,} agree on all shards, and when asked twice.")
        )
    titles = [str(shard) for shard in range(len(majorities))] + ["repeat"]
    rows = [(str(replica), wrong[replica]) for replica in shown[:MAX_LISTED]]
    if rows:
        yield cell_grid("Replica", titles, rows, caption="Gradients by shard")
        same, other = swatch("=", "good"), swatch("\N{MULTIPLICATION X}", "bad")
        yield remark(
            Html(f"{same} like most replicas, {other} unlike them, or no majority. Repeat: the same when asked twice.")
        )
    if len(shown) > MAX_LISTED:
        yield remark(text(f"{counted(len(shown) - MAX_LISTED, 'more replica')} differ; verify.json has them all."))


def _majority(digests: Sequence[str]) -> str | None:
    """The digest of more than half the replicas."""
    digest, count = Counter(digests).most_common(1)[0]
    return digest if 2 * count > len(digests) else None


def _show_exact_runs(details: Details, name: str) -> Iterable[Html]:
    parts = []
    for index, run in enumerate(details["runs"]):
        first = run.get("first_difference")
        outcome = "equal" if first is None else f"different from step {first} on"
        steps = counted(len(run["losses"]), "step")
        title = f"Losses of {steps} with {run['optimizer']}, on all replicas and on one: {outcome}"
        svg = to_svg(partial(draw_losses, run), name=f"{name}-{index}", title=printable(title))
        parts.append(picture(svg, caption=f"{run['optimizer']}, {steps}: {outcome}"))
    yield side_by_side(parts)


def _show_noise(details: Details, name: str) -> Iterable[Html]:
    noise, distance, limit = details["noise"], details["distance"], details["limit"]
    if not noise:
        return
    title = f"Distance {digits(distance)} of the weights from those of one replica; the limit is {digits(limit)}"
    svg = to_svg(lambda: draw_noise(noise, distance=distance, limit=limit), name=name, title=title)
    yield picture(svg, caption=f"Distance {digits(distance)}, limit {digits(limit)}")


def _show_numbers(details: Details, name: str) -> Iterable[Html]:
    numbers = details["numbers"]
    if not numbers:
        return
    columns = [
        Column("Number"),
        Column("Value", "number"),
        Column("Low", "number"),
        Column("High", "number"),
        Column("Deviations", "number"),
    ]
    rows = [
        [
            text(number["name"]),
            *(text(_precise(number[key])) for key in ("value", "low", "high")),
            text(f"{number['deviations']:+.1f}".replace("-", "\N{MINUS SIGN}") if "deviations" in number else ""),
        ]
        for number in numbers
    ]
    inside = sum(number["low"] <= number["value"] <= number["high"] for number in numbers)
    title = f"{inside} of {counted(len(numbers), 'number')} inside the band"
    values = table(columns, rows, caption="Values and bands")
    svg = to_svg(lambda: draw_bands(numbers), name=name, title=title)
    yield side_by_side([picture(svg, caption=title), values])


def _show_history(details: Details, _: str) -> Iterable[Html]:
    history = details["history"][:MAX_LISTED]
    columns = [
        Column("Epoch", "number"),
        Column("Loss", "number"),
        Column("Validation loss", "number"),
        Column("Validation accuracy", "number"),
    ]
    rows = [
        [
            text(row["epoch"]),
            text(f"{row['loss']:.4f}"),
            text(f"{row['val_loss']:.4f}"),
            text(f"{100 * row['val_accuracy']:.2f}%"),
        ]
        for row in history
    ]
    if rows:
        yield table(columns, rows, caption="Epochs")


def _show_overflow(details: Details, _: str) -> Iterable[Html]:
    overflow = details["overflow"]
    skipped: Sequence[bool] = overflow["skipped_on"]
    yield facts(
        [
            ("Step with an overflow", text(f"skipped on {sum(skipped)} of {counted(len(skipped), 'replica')}")),
            (
                "Loss scale",
                text(f"{overflow['scale_before']:,.0f} \N{RIGHTWARDS ARROW} {overflow['scale_after']:,.0f}"),
            ),
        ]
    )
    alone = [replica for replica, did in enumerate(skipped) if not did]
    if alone:
        listed = ", ".join(map(str, alone[:MAX_LISTED])) + (", …" if len(alone) > MAX_LISTED else "")
        yield remark(text(f"Not skipped on replica {listed}."), "bad")


def _show_files(details: Details, _: str) -> Iterable[Html]:
    pairs = [(title, text(seconds_text(details[key]))) for title, key in (("Write", "write_s"), ("Read", "read_s"))]
    if "bytes" in details:
        pairs.append(("Checkpoint", text(describe_bytes(details["bytes"]))))
    yield facts(pairs)


def _show_rounds(details: Details, name: str) -> Iterable[Html]:
    rounds, ratio, limit = details["rounds"], details.get("slowest_ratio"), details["limit"]
    if not rounds or not rounds[0]:
        return
    caption = "Time of each block of steps" if ratio is None else f"Slowest replica: {ratio:.2f} times the fastest"
    title = f"{caption}; the limit is {limit:g}"
    yield picture(to_svg(lambda: draw_rounds(rounds, limit=limit), name=name, title=title), caption=caption)


def _show_scaling(details: Details, name: str) -> Iterable[Html]:
    points = details["points"]
    if not points:
        return
    title = "Images a second over the number of replicas, and an ideal scaling from the smallest number"
    throughput = to_svg(lambda: draw_throughput(points), name=f"{name}-a", title=title)
    efficiency = to_svg(lambda: draw_efficiency(points), name=f"{name}-b", title="Efficiency over replicas")
    yield side_by_side([picture(throughput, caption="Throughput"), picture(efficiency, caption="Efficiency")])


def _show_step(details: Details, _: str) -> Iterable[Html]:
    compute, communication = details["compute_s"], details["communication_s"]
    total = compute + communication
    yield facts(
        [
            ("Computing", join([share_bar(compute / total), text(f" {seconds_text(compute)}, {compute / total:.0%}")])),
            (
                "Communicating",
                join(
                    [
                        share_bar(communication / total),
                        text(f" {seconds_text(communication)}, {communication / total:.0%}"),
                    ]
                ),
            ),
        ]
    )


def _show_comparison(details: Details, name: str) -> Iterable[Html]:
    compared = details["compared"]
    if not compared:
        return
    slower = sum(entry["ratio"] > entry["limit"] for entry in compared)
    caption = f"{slower} of {counted(len(compared), 'time')} beyond the limit"
    yield picture(to_svg(lambda: draw_ratios(compared), name=name, title=caption), caption=caption)


def _show_no_comparison(details: Details, _: str) -> Iterable[Html]:
    if details["not_comparable"]:
        yield remark(text(f"Not comparable: {details['not_comparable']}"))


def _show_rest(details: Details) -> list[Html]:
    """What has no view of its own, if it is short."""
    pairs = []
    for key, value in details.items():
        values = value if isinstance(value, list) else [value]
        if values and len(values) <= 8 and all(isinstance(part, bool | int | float | str) for part in values):
            pairs.append((as_title(key), text(", ".join(_short(part) for part in values))))
    return [facts(pairs[:MAX_LISTED])] if pairs else []


def _short(value: bool | float | str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return digits(value) if isinstance(value, float) else value


def _precise(value: float) -> str:
    """Losses differ in their fourth digit; counts are whole."""
    return (
        f"{value:,.0f}" if value == int(value) and abs(value) >= 10 else f"{value:.4f}".replace("-", "\N{MINUS SIGN}")
    )


_VIEWS = tuple(
    _View(frozenset(needs), show, frozenset(may_use))
    for needs, show, may_use in (
        (("transfers",), _show_bandwidth, ()),
        (("examples", "exactly_once"), _show_examples, ("per_rank",)),
        (("digests",), _show_digests, ("repeats_equal", "shards")),
        (("runs",), _show_exact_runs, ()),
        (("noise", "distance", "limit"), _show_noise, ()),
        (("numbers",), _show_numbers, ()),
        (("history",), _show_history, ()),
        (("overflow",), _show_overflow, ()),
        (("write_s", "read_s"), _show_files, ("bytes",)),
        (("rounds", "limit"), _show_rounds, ("slowest_ratio",)),
        (("points",), _show_scaling, ()),
        (("compute_s", "communication_s"), _show_step, ()),
        (("compared",), _show_comparison, ()),
        (("not_comparable",), _show_no_comparison, ()),
    )
)
