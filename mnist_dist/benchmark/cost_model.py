"""A model of how long a step takes on N replicas: compute from measurements, communication from latency and bandwidth.

A message of m bytes takes alpha + m beta seconds (Hockney 1994); a collective is a number of messages one after the
other (Thakur, Rabenseifner and Gropp 2005). docs/scaling.md has the formulas, their results, and what they leave out:
overlap of communication with compute, congestion, stragglers. Arithmetic only: no TensorFlow, no other process.

All times are seconds, all sizes bytes, all rates per second.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from mnist_dist.engine.exchange import choose_way
from mnist_dist.engine.shards import ShardPlan

Mode = Literal["strong", "weak"]
"""strong: the global batch is divided over the replicas. weak: each replica has as many rows as one has alone."""


@dataclass(frozen=True)
class Link:
    """What a message between two replicas costs: alpha_s + bytes x beta_s_per_byte (Hockney 1994).

    Args:
        alpha_s: latency, seconds per message.
        beta_s_per_byte: seconds per byte, the inverse of the bandwidth in one direction.
    """

    alpha_s: float
    beta_s_per_byte: float

    def __post_init__(self) -> None:
        if not (0 <= self.alpha_s < math.inf and 0 <= self.beta_s_per_byte < math.inf):
            raise ValueError(f"{self}: latency and time per byte must be finite and not negative")


class Collective(Protocol):
    """Seconds of a collective; linear in the link's two numbers, 0 with one replica."""

    def __call__(self, link: Link, *, num_bytes: float, num_replicas: int) -> float:
        """`num_bytes` are those of one replica's message."""
        ...


def ring_all_reduce_s(link: Link, *, num_bytes: float, num_replicas: int) -> float:
    """2 (N-1) alpha + 2 (N-1)/N m beta: reduce-scatter and all-gather round a ring (Thakur et al. 2005)."""
    steps = 2 * (_checked(num_replicas) - 1)
    return steps * (link.alpha_s + num_bytes / num_replicas * link.beta_s_per_byte)


def tree_all_reduce_s(link: Link, *, num_bytes: float, num_replicas: int) -> float:
    """2 ceil(log2 N) alpha + 2 m beta: up and down two pipelined trees (Sanders, Speck and Traff 2009), as in NCCL.

    Recursive halving and doubling (Thakur et al. 2005) has the same latency, and (N-1)/N of the bandwidth term.
    """
    if _checked(num_replicas) == 1:
        return 0.0
    depth = (num_replicas - 1).bit_length()
    return 2 * (depth * link.alpha_s + num_bytes * link.beta_s_per_byte)


def all_reduce_s(link: Link, *, num_bytes: float, num_replicas: int) -> float:
    """Ring or tree, whichever is faster: libraries such as NCCL choose by the size of the message."""
    return min(
        algorithm(link, num_bytes=num_bytes, num_replicas=num_replicas)
        for algorithm in (ring_all_reduce_s, tree_all_reduce_s)
    )


def hierarchical_all_reduce_s(
    inside: Link, *, between: Link, num_bytes: float, num_replicas: int, replicas_per_node: int
) -> float:
    """Reduce-scatter in each node, all-reduces of the parts between nodes, all-gather in each node.

    Args:
        inside: the link in a node.
        between: the link of a replica's own network card; all replicas of a node send their m / `replicas_per_node`
            bytes in parallel.
        num_bytes: a replica's message.
        num_replicas: of all nodes together.
        replicas_per_node: of a full node.
    """
    local = min(_checked(num_replicas), replicas_per_node)
    num_nodes = math.ceil(num_replicas / replicas_per_node)
    if num_nodes == 1:
        return all_reduce_s(inside, num_bytes=num_bytes, num_replicas=local)
    return ring_all_reduce_s(inside, num_bytes=num_bytes, num_replicas=local) + all_reduce_s(
        between, num_bytes=num_bytes / local, num_replicas=num_nodes
    )


def exact_reduction_s(
    link: Link, *, num_bytes: int, num_replicas: int, num_shards: int, has_all_to_all: bool = True
) -> float:
    """What `reproducibility=exact` sends, in the way that the program chooses (`engine.exchange`).

    gather:  (N-1) (alpha + k m beta), every replica's whole subtrees to all others.
    scatter: (N-1) (2 alpha + (k+1)/N m beta), a slice of them to each other replica, and the slices' sums back.

    k is the largest number of subtrees that a replica holds, 1 where each replica's shards are one subtree, as with
    powers of two. Two such replicas all-reduce their sums.

    Args:
        link: between any two replicas.
        num_bytes: of one sum over shards.
        num_replicas: at most `num_shards`, otherwise ValueError.
        num_shards: virtual shards of the global batch.
        has_all_to_all: of the strategy; without, it is always a gather.
    """
    plan = ShardPlan(num_shards, rows_per_shard=1, num_replicas=_checked(num_replicas))
    way = choose_way(plan, num_bytes=num_bytes, has_all_to_all=has_all_to_all)
    if way == "all_reduce":
        return all_reduce_s(link, num_bytes=num_bytes, num_replicas=num_replicas)
    if way == "gather":
        return (num_replicas - 1) * (link.alpha_s + plan.most_subtrees * num_bytes * link.beta_s_per_byte)
    slices = (plan.most_subtrees + 1) * num_bytes / num_replicas
    return (num_replicas - 1) * (2 * link.alpha_s + slices * link.beta_s_per_byte)


@dataclass(frozen=True)
class Interconnect:
    """How replicas are connected.

    Args:
        name: for tables and pictures.
        link: between any two replicas, or, with `inside`, between nodes.
        inside: the link within a node, if it is a different one.
        replicas_per_node: with `inside`.
    """

    name: str
    link: Link
    inside: Link | None = None
    replicas_per_node: int = 8

    def all_reduce_s(self, num_bytes: float, *, num_replicas: int) -> float:
        """Seconds until every replica has the sum of all replicas' messages of `num_bytes`."""
        if self.inside is None:
            return all_reduce_s(self.link, num_bytes=num_bytes, num_replicas=num_replicas)
        return hierarchical_all_reduce_s(
            self.inside,
            between=self.link,
            num_bytes=num_bytes,
            num_replicas=num_replicas,
            replicas_per_node=self.replicas_per_node,
        )


@dataclass(frozen=True)
class Device:
    """How fast one replica computes.

    Args:
        launch_s: seconds per step to launch the kernels, whatever they compute.
        overhead_s: further seconds per step that do not depend on the rows (the optimizer's update, for example).
        rows_per_s: rows per second on top of that.
    """

    launch_s: float
    overhead_s: float
    rows_per_s: float

    def compute_s(self, num_rows: float) -> float:
        """Seconds for `num_rows` rows, without the launches."""
        return self.overhead_s + num_rows / self.rows_per_s


@dataclass(frozen=True)
class Workload:
    """The training: defaults are those of the recipe.

    Args:
        num_examples: rows of an epoch.
        batch_rows: rows of the global batch (strong), or of each replica's (weak).
        message_bytes: what is reduced each step; gradients of 269,322 weights and two metric sums, as float32.
    """

    num_examples: int = 49_500
    batch_rows: int = 512
    message_bytes: int = 4 * (269_322 + 2)

    def rows_per_replica(self, mode: Mode, *, num_replicas: int) -> int:
        """Rows that the busiest replica computes in a step."""
        assert mode in get_args(Mode), mode
        return math.ceil(self.batch_rows / num_replicas) if mode == "strong" else self.batch_rows

    def steps_per_epoch(self, mode: Mode, *, num_replicas: int) -> int:
        """Whole steps; the last one may be short, but is computed in full."""
        global_rows = self.batch_rows * (num_replicas if mode == "weak" else 1)
        return math.ceil(self.num_examples / global_rows)


@dataclass(frozen=True)
class Prediction:
    """A step and an epoch on `num_replicas` replicas, in seconds."""

    num_replicas: int
    launch_s: float
    compute_s: float
    communication_s: float
    steps_per_epoch: int

    @property
    def step_s(self) -> float:
        """Launch, compute and communication, one after the other."""
        return self.launch_s + self.compute_s + self.communication_s

    @property
    def epoch_s(self) -> float:
        """All steps of an epoch; no validation."""
        return self.steps_per_epoch * self.step_s


def predict(
    device: Device, *, interconnect: Interconnect, mode: Mode, num_replicas: int, workload: Workload | None = None
) -> Prediction:
    """The model: launch + overhead + rows / throughput + all-reduce; `workload` is the recipe's unless given."""
    workload = workload or Workload()
    return Prediction(
        num_replicas=num_replicas,
        launch_s=device.launch_s,
        compute_s=device.compute_s(workload.rows_per_replica(mode, num_replicas=_checked(num_replicas))),
        communication_s=interconnect.all_reduce_s(workload.message_bytes, num_replicas=num_replicas),
        steps_per_epoch=workload.steps_per_epoch(mode, num_replicas=num_replicas),
    )


def speed_up(alone: Prediction, together: Prediction) -> float:
    """How many times faster an epoch is: Amdahl's speed-up with strong scaling, about Gustafson's with weak."""
    return alone.epoch_s / together.epoch_s


def efficiency(alone: Prediction, together: Prediction, *, mode: Mode) -> float:
    """Rows per second and replica, relative to one replica alone; 1 is perfect. Steps count as full."""
    rows_factor = together.num_replicas if mode == "strong" else 1
    return alone.step_s / together.step_s / rows_factor


def amdahl_limit(device: Device, *, workload: Workload | None = None) -> float:
    """Strong scaling's speed-up with a free interconnect and any number of replicas (Amdahl 1967)."""
    rows = (workload or Workload()).batch_rows
    fixed = device.launch_s + device.overhead_s
    return (device.launch_s + device.compute_s(rows)) / fixed if fixed else math.inf


def doublings(limit: int = 1024) -> list[int]:
    """1, 2, 4, ... up to `limit`."""
    return [1 << power for power in range(limit.bit_length())]


def last_paying(time_s: Callable[[int], float], *, limit: int = 1024, min_gain: float = 0.1) -> int:
    """The number of replicas where one more doubling saves less than `min_gain` of the time for the first time.

    Args:
        time_s: seconds on that many replicas (of an epoch, say).
        limit: the largest number of replicas; the answer where every doubling up to it pays.
        min_gain: a share of the time.
    """
    numbers = doublings(limit)
    for few, many in itertools.pairwise(numbers):
        if time_s(many) > (1 - min_gain) * time_s(few):
            return few
    return numbers[-1]


def fastest(time_s: Callable[[int], float], *, limit: int = 1024) -> int:
    """The number of replicas, of 1, 2, 4, ... `limit`, with the least time; the smaller one of equals."""
    return min(doublings(limit), key=time_s)


def fit_link(rows: Iterable[Mapping[str, Any]], *, algorithm: Collective = ring_all_reduce_s) -> Link:
    """The link that best explains measured all-reduces.

    Least squares of the relative errors, since the times span orders of magnitude; neither number may be negative.
    Costs that do not depend on the number of replicas (negotiation, a cycle time) end up in alpha, so a link fitted to
    two replicas is too slow for many: measure on several numbers of replicas.

    Args:
        rows: each with `bytes` of a replica's message, `seconds` and `num_replicas`, as `benchmark` writes them.
            Rows of one replica say nothing about the link and are ignored.
        algorithm: the one that was measured.

    Raises:
        ValueError: an impossible row, or too few different ones to tell latency and bandwidth apart.
    """
    systems = []
    for row in rows:
        size, seconds, num_replicas = float(row["bytes"]), float(row["seconds"]), int(row["num_replicas"])
        if not (math.isfinite(size) and size >= 0 and 0 < seconds < math.inf and num_replicas >= 1):
            raise ValueError(f"all-reduce {dict(row)}: bytes, seconds and replicas must be positive numbers")
        if num_replicas > 1:
            latency = algorithm(Link(1, 0), num_bytes=size, num_replicas=num_replicas)
            transfer = algorithm(Link(0, 1), num_bytes=size, num_replicas=num_replicas)
            systems.append([latency / seconds, transfer / seconds])
    try:
        alpha, beta = _fit_line(np.array(systems).reshape(-1, 2))
    except ValueError as error:
        raise ValueError(
            f"{len(systems)} all-reduces over two or more replicas do not tell latency and bandwidth apart: "
            f"measure at least two sizes"
        ) from error
    return Link(alpha, beta)


def fit_device(rows: Sequence[Mapping[str, Any]], *, launch_s: float = 0.0) -> Device:
    """Overhead and throughput from measured steps of one replica, by least squares of the relative errors.

    Args:
        rows: each with `rows` of the batch and `seconds` of a step.
        launch_s: how much of the measured constant time is launching; it is subtracted from the overhead.

    Raises:
        ValueError: fewer than two sizes of a batch.
    """
    system = np.array([[1 / row["seconds"], row["rows"] / row["seconds"]] for row in rows]).reshape(-1, 2)
    constant, per_row = _fit_line(system)
    if per_row == 0:
        raise ValueError("the measured steps do not take longer with more rows")
    return Device(launch_s=launch_s, overhead_s=max(0.0, constant - launch_s), rows_per_s=1 / per_row)


def _fit_line(system: NDArray[np.float64]) -> tuple[float, float]:
    """Non-negative x of shape (2,) with the least |`system` x - 1|; ValueError where many are equally good."""
    # Bytes and seconds differ by many powers of ten, which would spoil the rank test.
    scale = np.linalg.norm(system, axis=0)
    if len(system) < 2 or not scale.all() or np.linalg.matrix_rank(system / scale, tol=1e-6) < 2:
        raise ValueError("fewer than two different rows")
    scaled, ones = system / scale, np.ones(len(system))
    best = np.linalg.lstsq(scaled, ones, rcond=None)[0]
    if (best < 0).any():
        # Then one of the two is 0 at the optimum. The columns are unit vectors of positive numbers.
        candidates = np.diag(scaled.T @ ones)
        best = min(candidates, key=lambda x: float(np.linalg.norm(scaled @ x - ones)))
    return float(best[0] / scale[0]), float(best[1] / scale[1])


def _checked(num_replicas: int) -> int:
    if num_replicas < 1:
        raise ValueError(f"{num_replicas} replicas")
    return num_replicas
