"""Where the time of a training step goes, by type of operation: a summary of what TensorFlow's profiler traced."""

import collections
import re
from collections.abc import Iterable, Sequence
from typing import Any

Span = tuple[int, int, str]
"""Something a thread did: start and duration in picoseconds, and the name that the profiler gives it."""

EXECUTOR = "executor"
IDLE = "idle"
_EXECUTOR_SPAN = "ExecutorState::Process"
_OPERATION = re.compile(r"[^:\s]+:(\w+)")  # NODE:TYPE


def summarize(threads: Iterable[Iterable[Span]], *, num_steps: int, seconds: float) -> dict[str, Any]:
    """The part of each type of operation in the time of a step, largest first.

    Only threads that executed operations count. Their time is the wall time of the steps, `seconds`, times their
    number. Three kinds of it make up the whole: in operations; around them, in TensorFlow's executor (EXECUTOR); and
    the rest (IDLE), in which there was nothing to do or the processor worked for someone else. Operations that
    TensorFlow finds too short to be traced are part of EXECUTOR.
    """
    totals: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    num_threads = 0
    for spans in threads:
        own = [(start, duration, kind) for start, duration, name in spans if (kind := _kind_of(name)) is not None]
        num_threads += any(kind == EXECUTOR for *_, kind in own)
        totals.update(self_times(own))
        counts.update(kind for *_, kind in own)
    available = num_threads * seconds * 1e12
    totals[IDLE] = round(available - totals.total())
    return {
        "threads": num_threads,
        "steps": num_steps,
        "step_ms": 1e3 * seconds / num_steps,
        "operations": [
            {
                "operation": kind,
                "ms": total / 1e9 / num_steps,
                "share": total / available,
                "count": counts[kind] / num_steps,
            }
            for kind, total in totals.most_common()
        ],
    }


def self_times(spans: Sequence[Span]) -> dict[str, int]:
    """The time of each kind of span less that of the spans within, on one thread."""
    times: dict[str, int] = collections.Counter()
    around: list[tuple[int, str]] = []  # end and kind, the innermost last
    for start, duration, kind in sorted(spans, key=lambda span: (span[0], -span[1])):
        while around and around[-1][0] <= start:
            around.pop()
        if around:
            times[around[-1][1]] -= duration
        times[kind] += duration
        around.append((start + duration, kind))
    return times


def _kind_of(name: str) -> str | None:
    """EXECUTOR or the type of operation; None for what else is traced, whose time counts to what it is part of."""
    if name == _EXECUTOR_SPAN:
        return EXECUTOR
    operation = _OPERATION.fullmatch(name)
    return operation[1] if operation else None
