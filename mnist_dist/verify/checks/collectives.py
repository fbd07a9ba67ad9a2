"""Check 3: are the backend's collectives right, and how fast are they?

Replica r contributes 4^r to a sum, so that each base-4 digit of the sum tells how often a contribution was counted: a
missing, doubled or foreign one is named. Twelve replicas fit into the 24 bits of float32; more take turns, in blocks.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from mnist_dist.base.array import Array
from mnist_dist.strategy.base import Strategy
from mnist_dist.verify.checks.base import Detector, Evidence, Finding, by_replica, minority
from mnist_dist.verify.context import Context
from mnist_dist.verify.quiet import spread_of
from mnist_dist.verify.replicas import Boxes

_BLOCK = 12
_BYTES = (4, 64, 1024, 16 * 1024, 256 * 1024, 1024**2, 4 * 1024**2, 16 * 1024**2)
_LOOP = 4  # collectives in a compiled call, so that the call itself does not count
_TIMES = 6


class Collectives(Detector):
    """All-reduce, all-gather and broadcast of 4 bytes to 16 MB, with results that are known exactly."""

    name = "collectives"
    needs = ("identity",)

    def measure(self, context: Context) -> Evidence:
        """For each transfer what each replica got, and the seconds it took."""
        rows = []
        for size in _BYTES:
            for name, transfer in _TRANSFERS.items():
                context.enter(f"{name} of {size} bytes")
                got, seconds = transfer(context, size)
                rows.append({"collective": name, "bytes": size, "got": got, "seconds": seconds})
        return {"rows": rows}

    def judge(self, evidence: Sequence[Evidence]) -> Finding:
        """Every element must be exact."""
        transfers = []
        for number, row in enumerate(evidence[0]["rows"]):
            got = by_replica([one["rows"][number] for one in evidence], "got")
            problem = _explain(got)
            what = f"{row['collective']} of {row['bytes']} bytes"
            if problem is not None:
                blamed = {replica: f"{what}: {text}" for replica, text in problem.items() if replica >= 0}
                return Finding("fail", f"{what}: {'; '.join(problem.values())}", blamed, of="replica")
            times = [one["rows"][number]["seconds"] for one in evidence]
            seconds = statistics.median(map(min, times))
            transfers.append(
                {"collective": row["collective"], "bytes": row["bytes"], "seconds": seconds,
                 "spread": max(map(spread_of, times)),
                 "bus_gb_per_s": _bus_bytes(row["collective"], row["bytes"], len(got)) / seconds / 1e9}
            )  # fmt: skip
        summary = f"all {len(transfers)} transfers are exact"
        if len(by_replica([one["rows"][0] for one in evidence], "got")) > 1:
            fastest = max(one["bus_gb_per_s"] for one in transfers if one["collective"] == "all_reduce")
            summary += f"; all-reduce: {1e6 * transfers[0]['seconds']:.0f} µs for 4 bytes, at most {fastest:.2f} GB/s"
        return Finding("pass", summary, details={"transfers": transfers})

    def spoil(self, evidence: Sequence[Evidence]) -> int | None:
        """The last replica's contribution to one sum is counted three times."""
        num_replicas = sum(len(one["rows"][0]["got"]) for one in evidence)
        row = next(number for number, row in enumerate(evidence[0]["rows"]) if row["collective"] == "all_reduce")
        last = (num_replicas - 1) % _BLOCK
        for one in evidence:
            for got in one["rows"][row]["got"]:
                block = got[-1]
                block.update(wrong=1, value=block["expected"] + 2 * 4.0**last, element=0)
        return len(evidence) - 1


def _explain(got: Sequence[list[dict[str, Any]]]) -> dict[int, str] | None:
    """What is wrong with what the replicas got, by replica (-1: of unknown origin); None if all is exact."""
    for block in range(len(got[0])):
        results = [own[block] for own in got]
        wrong = [index for index, result in enumerate(results) if result["wrong"]]
        if not wrong:
            continue
        first = results[wrong[0]]
        shown = f"{first['value']:g} in place of {first['expected']:g}"
        # A fault on the way to one replica, unless (nearly) all got the same wrong sum.
        odd = minority([(result["wrong"], result["value"]) for result in results])
        if len(wrong) < len(results) and not (odd and set(odd).isdisjoint(wrong)):
            return {index: f"replica {index} got {shown} ({results[index]['wrong']} elements)" for index in wrong}
        if first["source"] is not None:
            source = first["source"]
            return {source: f"what replica {source} sent arrived as {first['value']:g} ({first['wrong']} elements)"}
        start = block * _BLOCK
        counts = _contributions(first, num_replicas=min(_BLOCK, len(results) - start)) or []
        blamed = {
            start + index: f"replica {start + index}'s contribution was "
            + ("missing" if count == 0 else f"counted {count} times")
            for index, count in enumerate(counts)
            if count != 1
        }
        return blamed or {-1: f"every replica got {shown}, a contribution that none made"}
    return None


def _contributions(result: dict[str, Any], *, num_replicas: int) -> list[int] | None:
    """How often each replica's 4^r is in a sum; None if it is not such a sum."""
    value = result["value"]
    if not (np.isfinite(value) and value == int(value) and 0 <= value < 4**num_replicas and result["digits"]):
        return None
    return [int(value) // 4**index % 4 for index in range(num_replicas)]


def _bus_bytes(collective: str, num_bytes: int, num_replicas: int) -> float:
    """Bytes that the slowest link must carry at least (as nccl-tests define bus bandwidth)."""
    factor = {"all_reduce": 2.0, "all_gather": 1.0, "broadcast": 1.0}[collective]
    return factor * num_bytes * (num_replicas - 1) / num_replicas if collective != "broadcast" else float(num_bytes)


def _compare(result: tf.Tensor, expected: tf.Tensor) -> tf.Tensor:
    """How many elements are wrong, and the first that is: value and place."""
    result = tf.reshape(result, [-1])
    is_wrong = result != tf.reshape(expected, [-1])
    first = tf.argmax(tf.cast(is_wrong, tf.int32))
    number = tf.reduce_sum(tf.cast(is_wrong, tf.float64))
    return tf.stack([number, tf.cast(result[first], tf.float64), tf.cast(first, tf.float64)])


def _looped(strategy: Strategy, body: Callable[[tf.Tensor], tf.Tensor]) -> tuple[list[Array], list[float]]:
    """Call a replica's `body` a few times in one compiled loop, repeatedly; each one's comparison, and seconds a call.

    `body` multiplies what it sends by its argument, 1, so that no call can be left out.
    """
    boxes = Boxes(strategy, np.zeros(3))

    def run(factor: tf.Tensor) -> tf.Tensor:
        return strategy.run(lambda own: boxes.fill(body(own)), factor)

    compiled = tf.function(lambda ones: tf.map_fn(run, ones, parallel_iterations=1), autograph=False)
    times = []
    for _ in range(1 + _TIMES):  # the first one compiles
        start = time.perf_counter()
        compiled(tf.ones([_LOOP])).numpy()
        times.append((time.perf_counter() - start) / _LOOP)
    return boxes.read(), times[1:]


def _described(
    comparisons: Sequence[Array], *, expected: float, digits: bool = False, each: int = 0
) -> list[dict[str, Any]]:
    """As JSON values; `digits`: the sum tells by its digits whose contribution is wrong, `each`: its place does."""
    return [
        {
            "wrong": int(wrong),
            "value": float(value),
            "element": int(element),
            "expected": expected,
            "digits": digits,
            "source": int(element) // each if each else None,
        }
        for wrong, value, element in comparisons
    ]


def _all_reduce(context: Context, size: int) -> tuple[list[list[dict[str, Any]]], list[float]]:
    strategy = context.strategy
    by_block, seconds = [], [float("inf")] * _TIMES
    for first in range(0, strategy.num_replicas, _BLOCK):
        members = range(first, min(first + _BLOCK, strategy.num_replicas))
        expected = float(sum(4 ** (replica - first) for replica in members))

        def body(
            factor: tf.Tensor, first: int = first, members: range = members, expected: float = expected
        ) -> tf.Tensor:
            replica = strategy.replica_index()
            own = 4.0 ** (replica - first) if replica in members else 0.0
            return _compare(strategy.all_reduce_sum(tf.fill([size // 4], own) * factor), tf.fill([size // 4], expected))

        comparisons, seconds_a_call = _looped(strategy, body)
        by_block.append(_described(comparisons, expected=expected, digits=True))
        seconds = [min(pair) for pair in zip(seconds, seconds_a_call, strict=True)]
    return [list(blocks) for blocks in zip(*by_block, strict=True)], seconds


def _all_gather(context: Context, size: int) -> tuple[list[list[dict[str, Any]]], list[float]]:
    """`size` is that of the whole result; each replica sends its share of the rows."""
    strategy = context.strategy
    each = max(1, size // 4 // strategy.num_replicas)

    def body(factor: tf.Tensor) -> tf.Tensor:
        gathered = strategy.all_gather(tf.fill([each], 1.0 + strategy.replica_index()) * factor)
        return _compare(gathered, tf.repeat(tf.range(1.0, 1.0 + strategy.num_replicas), each))

    comparisons, seconds = _looped(strategy, body)
    return [[one] for one in _described(comparisons, expected=0.0, each=each)], seconds


def _broadcast(context: Context, size: int) -> tuple[list[list[dict[str, Any]]], list[float]]:
    """Variables are created with rank 0's value: that is the only broadcast of a training."""
    own = np.full(size // 4, 1.0 + context.topology.rank, np.float32)
    seconds = []
    for _ in range(_TIMES):
        start = time.perf_counter()
        variable = context.strategy.create_variable(own)
        seconds.append(time.perf_counter() - start)
    comparisons = []
    for copy in context.strategy.copies(variable):
        wrong = np.flatnonzero(copy != 1.0)
        comparisons.append(np.array([len(wrong), copy[wrong[0]] if len(wrong) else 1.0, wrong[0] if len(wrong) else 0]))
    return [[one] for one in _described(comparisons, expected=1.0)], seconds


_TRANSFERS: dict[str, Callable[[Context, int], tuple[list[list[dict[str, Any]]], list[float]]]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "broadcast": _broadcast,
}
