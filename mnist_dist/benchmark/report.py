"""From what was measured to rows, ratios and targets: the content of `benchmark.json`, and the lines of the log."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mnist_dist.benchmark.entries import OURS
from mnist_dist.benchmark.referee import EPOCH, MESSAGES, ONCE, PROFILE, Entry

Row = dict[str, Any]
RATIOS = ("keras_published", "keras_best", "floor")


def build_rows(entries: Sequence[Entry], *, warmup: int) -> list[Row]:
    """A row for each contender and part of it, with its ratios to Keras and to the floor of the same precision."""
    rows = [row for entry in entries for row in _rows_of(entry, warmup=warmup)]
    for precision in {row["precision"] for row in rows}:
        known = [row for row in rows if row["precision"] == precision and "median_s" in row]
        keras = {row["name"]: row["median_s"] for row in known if row["kind"] == "keras"}
        floor = next((row["median_s"] for row in known if row["kind"] == "floor"), None)
        best = min(keras, key=lambda name: keras[name], default=None)
        references = {
            "keras_published": keras.get("keras"),
            "keras_best": keras[best] if best is not None else None,
            "floor": floor,
        }
        for row in known:
            row["is_best_keras"] = row["name"] == best
            if row["part"] == EPOCH:
                row["ratios"] = {key: row["median_s"] / value for key, value in references.items() if value}
    return rows


def _rows_of(entry: Entry, *, warmup: int) -> Iterator[Row]:
    contender, facts = entry.contender, entry.facts
    common = {
        "name": contender.name,
        "contender": contender.text,
        "kind": contender.kind,
        "precision": facts.get("precision", contender.precision),
        "processes": contender.processes,
        "facts": facts,
    }
    if entry.error is not None:
        yield {**common, "part": EPOCH, "status": "failed", "error": entry.error}
        return
    for part, answers in entry.measured.items():
        if part in ONCE:
            continue
        seconds = [answer["seconds"] for answer in answers]
        counted = seconds[warmup:]
        last: Row = {key: answers[-1][key] for key in ("loss", "val_accuracy") if key in answers[-1] and part == EPOCH}
        yield {
            **common,
            "part": part,
            "status": "ok",
            "warmup_s": seconds[:warmup],
            "epochs_s": counted,
            "median_s": statistics.median(counted),
            "min_s": min(counted),
            "max_s": max(counted),
            **last,
        }


def build_jobs(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each job of several processes: its epoch against its computing alone plus its all-reduces alone."""
    parts: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["status"] == "ok":
            parts.setdefault(row["contender"], {})[row["part"]] = row
    jobs = []
    for row in parts.values():
        if {EPOCH, "compute", "all_reduces"} <= set(row):
            seconds = {f"{part}_s": row[part]["median_s"] for part in (EPOCH, "compute", "all_reduces")}
            ratio = seconds["epoch_s"] / (seconds["compute_s"] + seconds["all_reduces_s"])
            same = {key: row[EPOCH][key] for key in ("name", "precision")}
            jobs.append({**same, **seconds, "ratio": ratio})
    return jobs


def build_all_reduce(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Seconds of single all-reduces by size in bytes, of the jobs that measured them."""
    return [
        {**point, "num_replicas": answer["num_replicas"], "strategy": answer["strategy"]}
        for entry in entries
        for answer in entry.measured.get(MESSAGES, [])
        for point in answer["all_reduce"]
    ]


def build_profiles(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Where the time of a step goes (see `profile.summarize`), for each contender that was traced."""
    return [
        {"name": entry.contender.name, "precision": entry.facts["precision"], **answer["profile"]}
        for entry in entries
        for answer in entry.measured.get(PROFILE, [])
    ]


@dataclass(frozen=True)
class Target:
    """A target, and the measured value."""

    name: str
    value: float
    limit: float
    unit: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For `benchmark.json`."""
        return {**vars(self), "passed": self.value <= self.limit}

    def __str__(self) -> str:
        verdict = "pass" if self.value <= self.limit else "MISS"
        return f"{verdict}  {self.name}: {self.value:.2f}{self.unit}, target at most {self.limit:.2f}{self.unit}"


_LIMITS = {
    ("float32", "keras_best"): 0.50,
    ("float32", "floor"): 1.25,
    ("mixed_bfloat16", "keras_best"): 0.36,
    ("mixed_bfloat16", "floor"): 1.50,
}


def build_targets(
    rows: Sequence[Row], jobs: Sequence[Mapping[str, Any]], startup: Mapping[str, Any] | None
) -> list[Target]:
    """All targets that have a measured value."""
    epochs = [row for row in rows if row["part"] == EPOCH and row["kind"] == OURS and row["status"] == "ok"]
    # The first of a mode, since others have keys of their own.
    singles = {_mode(row): row for row in reversed(epochs) if row["facts"]["num_replicas"] == 1}
    targets = []
    for (precision, mode), row in singles.items():
        name = f"{row['name']}, {precision}, to"
        for key, reference in (("keras_best", "Keras at its best"), ("floor", "the floor")):
            limit = _LIMITS.get((precision, key))
            if limit is not None and key in row["ratios"]:
                targets.append(Target(f"{name} {reference}", row["ratios"][key], limit))
        fast = singles.get((precision, "fast"))
        if mode == "exact" and fast is not None:
            targets.append(Target(f"{name} {fast['name']}", row["median_s"] / fast["median_s"], 1.10))
    for row in epochs:
        single = singles.get(_mode(row))
        if single is not None and row["processes"] == 1 and row["facts"]["num_replicas"] > 1:
            name = f"{row['name']}, {row['precision']}, to {single['name']}"
            targets.append(Target(name, row["median_s"] / single["median_s"], 1.15))
    for job in jobs:
        targets.append(Target(f"{job['name']}, {job['precision']}, to its computing + all-reduces", job["ratio"], 1.15))
    for name in ("warm", "cold"):
        if startup and name in startup:
            times = startup[name]
            extra = times["first_minus_second_epoch_s"]
            targets.append(Target(f"first epoch less the second, {name} file cache", extra, 1.5, " s"))
            targets.append(Target(f"start-up to import tensorflow, {name} file cache", times["ratio"], 1.15))
    return targets


def _mode(row: Row) -> tuple[str, str]:
    return row["precision"], row["facts"]["reproducibility"]


def _describe_operations(found: Mapping[str, int] | None) -> str:
    if found is None:
        return ""
    return f"{found['device']}" + (f" + {found['host']} on the host" if found["host"] else "")


def format_table(rows: Sequence[Row]) -> list[str]:
    """The rows as lines of text."""
    ratios = ["/keras", "/best", "/floor"]
    titles = ["seconds an epoch", "precision", "median", "min", "max", *ratios, "val. acc.", "GPU op."]
    cells = [titles]
    for row in rows:
        name = row["name"] if row["part"] == EPOCH else f"  of it {row['part'].replace('_', '-')} alone"
        name += " *" if row.get("is_best_keras") else ""
        if row["status"] != "ok":
            cells.append([name, row["precision"], "failed", *[""] * 7])
            continue
        times = [f"{row[key]:.3f}" for key in ("median_s", "min_s", "max_s")]
        ratios = [f"{value:.2f}" if (value := row.get("ratios", {}).get(key)) else "" for key in RATIOS]
        accuracy = f"{row['val_accuracy']:.4f}" if "val_accuracy" in row else ""
        count = _describe_operations(row["facts"].get("gpu_operations")) if row["part"] == EPOCH else ""
        cells.append([name, row["precision"], *times, *ratios, accuracy, count])
    return _align(cells, num_words=2)


def format_profile(profile: Mapping[str, Any], *, num_rows: int = 20) -> list[str]:
    """The `num_rows` largest parts of a step as lines of text."""
    cells = [["operation", "ms a step", "share", "per step"]]
    for row in profile["operations"][:num_rows]:
        number = f"{row['count']:.1f}" if row["count"] else ""
        cells.append([row["operation"], f"{row['ms']:.3f}", f"{row['share']:.1%}", number])
    return _align(cells, num_words=1)


def _align(cells: Sequence[Sequence[str]], *, num_words: int) -> list[str]:
    """Lines of a table: the first `num_words` columns to the left, the others, numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column < num_words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
