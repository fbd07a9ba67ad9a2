"""Check 13: is this job slower than an earlier one on equal machines?"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mnist_dist.base.errors import UserError
from mnist_dist.base.versions import installed_versions
from mnist_dist.verify.checks.base import Detector, Evidence, Finding
from mnist_dist.verify.context import Context
from mnist_dist.verify.quiet import MAX_SPREAD
from mnist_dist.verify.report import CheckResult, RankFacts, Report

_LIMIT = 1.10
_FREE = ("run_dir", "checks", "budget_s", "deadline_s", "reference", "strict", "data", "console", "plots", "resume",
         "checkpoint", "trainer", "seed")  # fmt: skip
_MESSAGE_BYTES = (1024**2, 16 * 1024**2)


class Reference(Detector):
    """Compares times with those of one or several earlier reports, where these are comparable."""

    name = "reference"

    def __init__(self, measure: Callable[[], Evidence]) -> None:
        """Create it; `measure` returns what `compare` does."""
        self._measure = measure

    def why_not(self, context: Context) -> str:
        """There must be something to compare with."""
        return "" if context.asked.reference else "no reference=FILE was given"

    def measure(self, context: Context) -> Evidence:
        """On rank 0 the times of both."""
        return self._measure() if context.topology.is_chief else {}

    def judge(self, evidence: Sequence[Evidence]) -> Finding:
        """At most a tenth slower than the slowest of the earlier ones, as far as a time repeats itself."""
        current, earlier, reasons = (evidence[0][key] for key in ("current", "earlier", "reasons"))
        if not earlier:
            reason = reasons[0] if reasons else "it holds no verification"
            return Finding("info", f"not comparable: {reason}", {}, {"compared": [], "not_comparable": reason})
        compared = []
        for name, (seconds, spread) in current.items():
            before = [times[name] for times in earlier if name in times]
            if before:
                ratio = seconds / max(one for one, _ in before)
                noise = max(spread, *(other for _, other in before))
                compared.append({"name": name, "ratio": ratio, "limit": _LIMIT, "spread": noise})
        details = {"compared": compared, "not_comparable": None}
        told = [one for one in compared if one["spread"] <= MAX_SPREAD]
        if not told:
            return Finding("inconclusive", "no time in both reports repeats itself within 10 %", {}, details)
        uneven = f"; {len(compared) - len(told)} others are too uneven to tell" if len(told) < len(compared) else ""
        slower = [one for one in told if one["ratio"] > max(_LIMIT, 1 + 3 * one["spread"])]
        worst = max(slower or told, key=lambda one: one["ratio"])
        text = f"{worst['name']} takes {worst['ratio']:.2f} times as long as in the slowest of {len(earlier)} report(s)"
        if not slower:
            return Finding("pass", f"no time is more than a tenth over its reference: {text}{uneven}", {}, details)
        if evidence[0]["noise"]:
            return Finding("inconclusive", f"{text}, but {evidence[0]['noise']}", {}, details)
        return Finding("degraded", f"{text}; the limit is {_LIMIT}{uneven}", {}, details)

    def spoil(self, evidence: Sequence[Evidence]) -> int | None:
        """All times are a fifth longer than in the reference, on a quiet machine."""
        evidence[0].update(noise="", reasons=[], earlier=[{"step": [1.0, 0.0]}], current={"step": [1.2, 0.0]})
        return None


class Own(NamedTuple):
    """What is compared with references."""

    results: Sequence[CheckResult]
    ranks: Sequence[RankFacts]
    configuration: dict[str, Any]
    shares_cores: bool


def compare(own: Own, references: Sequence[tuple[str, Report]]) -> Evidence:
    """This job's times, those of the references that are comparable, and why the others are not."""
    setup = describe_setup(own.ranks, installed_versions(), own.configuration)
    earlier, reasons = [], []
    for name, report in references:
        reason = why_not_comparable(setup, describe_setup(report.ranks, report.versions, report.configuration))
        if reason:
            reasons.append(f"{name}: {reason}")
        else:
            earlier.append(times_of(report.checks, shares_cores=own.shares_cores))
    current = times_of(own.results, shares_cores=own.shares_cores)
    return {"current": current, "earlier": earlier, "reasons": reasons, "noise": noise_of(own.results)}


def times_of(results: Sequence[CheckResult], *, shares_cores: bool) -> dict[str, tuple[float, float]]:
    """The times that are compared, seconds (less is better), and how well each repeats itself.

    Where replicas share cores, those of one replica only: the others depend on what the system lets run first.
    """
    times: dict[str, tuple[float, float]] = {}
    details = {result.name: result.details for result in results}
    for transfer in details.get("collectives", {}).get("transfers", []):
        if transfer["bytes"] in _MESSAGE_BYTES and not shares_cores:
            name = f"{transfer['collective']} of {transfer['bytes'] // 1024**2} MB"
            times[name] = (transfer["seconds"], transfer["spread"])
    for point in details.get("scaling", {}).get("points", []):
        if point["replicas"] == 1 or not shares_cores:
            times[f"a step on {point['replicas']} replica(s), {point['kind']}"] = (point["step_s"], point["spread"])
    if steps := details.get("slow_rank", {}).get("step_s"):
        times["a step without communication, slowest rank"] = (max(steps), details["slow_rank"]["spread"])
    return times


def noise_of(results: Sequence[CheckResult]) -> str:
    """What makes this job's times doubtful, in words."""
    for result in results:
        if result.name in ("slow_rank", "scaling") and result.status == "inconclusive":
            return f"{result.name} was inconclusive"
    return ""


def describe_setup(
    ranks: Sequence[RankFacts], versions: dict[str, str], configuration: dict[str, Any]
) -> dict[str, str]:
    """What must be equal for times to be comparable."""
    return {
        "the number of ranks": str(len(ranks)),
        "the processors": str(sorted({rank.cpu for rank in ranks})),
        "the cores of a rank": str(sorted({rank.cores for rank in ranks})),
        "the GPUs of a rank": str(sorted({len(rank.gpus) for rank in ranks})),
        "the GPUs' model": str(sorted({rank.gpu for rank in ranks})),
        "the data set": str(configuration["data"]["name"]),
        **{f"the version of {name}": version for name, version in versions.items()},
        **{key: json.dumps(value, sort_keys=True) for key, value in configuration.items() if key not in _FREE},
    }


def why_not_comparable(one: dict[str, str], other: dict[str, str]) -> str:
    """The first thing that differs, in words; empty if nothing does."""
    for key in {**one, **other}:
        if one.get(key) != other.get(key):
            return f"{key}: {other.get(key)} there, {one.get(key)} here"
    return ""


def load_reports(text: str) -> list[tuple[str, Report]]:
    """The reports in a file or folder; raises UserError if there is none, or a damaged one."""
    path = Path(text).expanduser()
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    reports = []
    for file in files:
        try:
            reports.append((file.name if file.parent == path else str(file.relative_to(path.parent)),
                            Report.from_json(file.read_text())))  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError) as error:
            if path.is_dir() and file.name != "verify.json":
                continue  # some other file
            raise UserError(f"reference={text}: {file} is not a report of verify ({error})") from error
    if not reports:
        raise UserError(f"reference={text}: no verify.json there")
    return reports
