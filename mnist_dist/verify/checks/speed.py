"""Checks 11 and 12: does a replica hold the others up, and what do more replicas gain?

Times are compared only with their neighbours: blocks that do the same take turns. (NVIDIA's resiliency extension judges
stragglers the same way, by the fastest rank's median to each one's own.)
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mnist_dist.benchmark.contenders.ours import OneShare
from mnist_dist.engine.build import Engine, Programs
from mnist_dist.strategy.base import SingleDevice
from mnist_dist.verify.checks.base import Check, Detector, Evidence, Finding, by_replica, names_of
from mnist_dist.verify.checks.equality import first_steps, one_replica, rates
from mnist_dist.verify.context import Context
from mnist_dist.verify.quiet import MAX_SPREAD, Noise, Waiting, find_noise, find_withheld, spread_of

_STEPS, _SHORT_STEPS = 25, 8
_BLOCKS = 6
_ROUNDS = 2
_BLOCK_S = 0.25
_LIMIT, _LIMIT_OF_GPUS = 1.33, 1.15
_BEYOND_NOISE = 2.0
"""How much slower than the limit is slow even on a busy machine, after the waiting for a core is taken off: room for
what others cost besides, as they share caches, memory and a core's two threads."""


class Stopwatch:
    """Runs the first steps of a training again and again, from wherever its weights are."""

    def __init__(self, engine: Engine, *, steps: int = _STEPS) -> None:
        self.images = engine.plan.global_batch_size * steps
        self.steps = steps
        self._programs = Programs(engine)
        self._indices, self._rates = first_steps(engine, steps), 0 * rates(engine, steps)  # the weights stay
        self.run()  # compiles

    def run(self, times: int = 1) -> float:
        """Seconds for each run of the steps."""
        start = time.perf_counter()
        for _ in range(times):
            self._programs.train_epoch(self._indices, learning_rates=self._rates)
        return (time.perf_counter() - start) / times

    def run_fastest(self, times: int) -> tuple[float, float | None]:
        """Seconds of the fastest of some runs; and without its waiting for a core, if that is known."""
        runs = []
        for _ in range(times):
            waiting = Waiting()
            seconds, waited_s = self.run(), waiting.read()
            runs.append((seconds, None if waited_s is None else seconds - waited_s))
        return min(runs, key=lambda run: run[0])

    def times_for(self, seconds: float) -> int:
        """How many runs take about that long."""
        return max(1, round(seconds / self.run()))


class SlowRank(Detector):
    """Steps without collectives, between barriers: the same work on every replica at the same time."""

    name = "slow_rank"
    needs = ("identity",)

    def why_not(self, context: Context) -> str:
        """One replica has nobody to be slower than."""
        return one_replica(context)

    def measure(self, context: Context) -> Evidence:
        """Seconds of each block, by round and replica of this process."""
        devices = context.strategy.devices()
        watches = [Stopwatch(context.assemble(SingleDevice(device)), steps=_SHORT_STEPS) for device in devices]
        times = context.settle(watches[0].times_for(_BLOCK_S), min)
        blocks, noise = context.repeats(_BLOCKS), Noise()
        rounds: list[list[list[float]]] = []
        alone: list[list[list[float | None]]] = []
        for number in range(_ROUNDS):
            rounds.append([[] for _ in watches])
            alone.append([[] for _ in watches])
            for block in range(blocks):
                context.enter(f"round {number + 1}, block {block + 1}")
                for index, watch in enumerate(watches):
                    context.settle(None, lambda _: None)  # a barrier beside the collectives
                    seconds, alone_s = watch.run_fastest(times)
                    rounds[-1][index].append(seconds)
                    alone[-1][index].append(alone_s)
        limit = _LIMIT_OF_GPUS if context.strategy.on_gpu else _LIMIT
        return {"rounds": rounds, "alone": alone, "noise": noise.read(), "limit": limit,
                "step_s": min(min(own[0]) for own in rounds) / watches[0].steps}  # fmt: skip

    def judge(self, evidence: Sequence[Evidence]) -> Finding:
        """Slow is what is slower than the fastest in both rounds, by more than repeating itself explains.

        On a busy machine: by more than the others explain, too.
        """
        limit = evidence[0]["limit"]
        rounds = _rounds_of(evidence, "rounds")
        alone = _rounds_of(evidence, "alone")
        ratios = np.array([[min(own) / _fastest(blocks) for own in blocks] for blocks in rounds])
        # At least that slow: what others may have cost is taken off each rank's own time, not off the fastest one's.
        # Each block yields such a bound; the highest is left out, since it may be an accident.
        least = np.array([
            [sorted(0.0 if s is None else s for s in own)[-2] / _fastest(blocks) for own in without]
            for blocks, without in zip(rounds, alone, strict=True)
        ])  # fmt: skip
        spread = max(spread_of(own) for blocks in rounds for own in blocks)
        readings = [one["noise"] for one in evidence]
        withheld, noise = find_withheld(readings), find_noise(readings)
        slow = (ratios > limit).all(axis=0) & (ratios - 1 > 3 * spread).all(axis=0)
        if noise:
            slow = (least > _BEYOND_NOISE * limit).all(axis=0) & (not withheld)
        worst = float(ratios.min(axis=0).max())
        details = {"rounds": rounds, "alone": alone, "slowest_ratio": worst, "limit": limit, "spread": spread,
                   "step_s": [one["step_s"] for one in evidence]}  # fmt: skip
        if slow.any():
            shown, takes = (least, "takes at least") if noise else (ratios, "takes")
            blamed = {int(index): f"a step {takes} {shown[:, index].min():.2f} times as long as on the fastest"
                      for index in np.flatnonzero(slow)}  # fmt: skip
            text = f"{names_of(blamed, 'replica')}: {[*blamed.values()][-1]} (limit {limit}"
            text += f"; its waiting for a core is taken off, since {noise})" if noise else ")"
            return Finding("degraded", text, blamed, details, of="replica")
        if noise:
            return Finding("inconclusive", f"{noise} (slowest to fastest: {worst:.2f})", {}, details)
        if spread > MAX_SPREAD:
            text = f"blocks that do the same differ by {100 * spread:.0f} % (slowest to fastest: {worst:.2f})"
            return Finding("inconclusive", text, {}, details)
        return Finding("pass", f"the slowest replica takes {worst:.2f} times as long as the fastest", {}, details)

    def spoil(self, evidence: Sequence[Evidence]) -> int | None:
        """The last replica's blocks take 1.6 times as long, on a quiet machine."""
        fastest = min(seconds for one in evidence for blocks in one["rounds"] for own in blocks for seconds in own)
        for one in evidence:
            one["noise"].update(busy_s=0.0, own_s=0.0, steal_s=0.0, throttled=0)
            one["rounds"] = [[[fastest] * len(own) for own in blocks] for blocks in one["rounds"]]
            one["alone"] = one["rounds"]
        for blocks in evidence[-1]["rounds"]:
            blocks[-1] = [1.6 * seconds for seconds in blocks[-1]]
        return len(evidence) - 1


def _rounds_of(evidence: Sequence[Evidence], key: str) -> list[list[Any]]:
    """Each round's blocks, by replica."""
    return [by_replica([{"blocks": one[key][number]} for one in evidence], "blocks") for number in range(_ROUNDS)]


def _fastest(blocks: Sequence[Sequence[float]]) -> float:
    return min(min(own) for own in blocks)


class Scaling(Check):
    """Images per second on some of the replicas, with the same global batch (strong) and one that grows (weak)."""

    name = "scaling"
    needs = ("identity", "collectives")

    def why_not(self, context: Context) -> str:
        """One replica does not scale."""
        return one_replica(context)

    def measure(self, context: Context) -> Evidence:
        """Seconds of blocks that take turns, A B B A: one replica, all of them, and all with a larger batch."""
        config, num_replicas = context.config, context.strategy.num_replicas
        context.enter("compiling")
        weak = replace(config.batch, global_size=config.batch.global_size * num_replicas)
        entries: list[tuple[str, int, Stopwatch | None]] = []
        for subset in context.strategy.subsets():
            is_here = subset.num_replicas > 1 or context.topology.is_chief
            entries.append(("strong", subset.num_replicas, Stopwatch(context.assemble(subset)) if is_here else None))
        entries.append(("weak", num_replicas, Stopwatch(context.assemble(batch=weak), steps=_STEPS // 2)))
        share = _share(context)
        blocks, noise = context.repeats(_BLOCKS, least=2), Noise()
        seconds: list[list[float]] = [[] for _ in entries]
        compute: list[float] = []
        for block in range(blocks):
            order = range(len(entries)) if block % 2 == 0 else reversed(range(len(entries)))
            for index in order:
                kind, replicas, watch = entries[index]
                context.enter(f"block {block + 1}, {kind}, {replicas} replicas")
                context.settle(None, lambda _: None)
                if watch is not None:
                    seconds[index].append(watch.run(2) / watch.steps)
            if share is not None:
                compute.append(share())
        return {
            "points": [
                {"kind": kind, "replicas": replicas, "step_s": own,
                 "images": context.config.batch.global_size * (num_replicas if kind == "weak" else 1)}
                for (kind, replicas, _), own in zip(entries, seconds, strict=True)
            ],
            "compute_s": compute,
            "noise": noise.read(),
            "shares_cores": context.shares_cores,
        }  # fmt: skip

    def judge(self, evidence: Sequence[Evidence]) -> Finding:
        """Informs; only a reference can tell whether it is as it should be."""
        first = evidence[0]
        rate_of_one = first["points"][0]["images"] / min(first["points"][0]["step_s"])
        points = []
        for point in first["points"]:
            rate = point["images"] / min(point["step_s"])
            efficiency = rate / (rate_of_one * point["replicas"])
            points.append({"kind": point["kind"], "replicas": point["replicas"], "images_per_s": rate,
                           "step_s": min(point["step_s"]), "spread": spread_of(point["step_s"]),
                           "efficiency": efficiency})  # fmt: skip
        largest = [point for point in points if point["kind"] == "strong"][-1]
        computing = [min(one["compute_s"]) for one in evidence if one["compute_s"]]
        details: dict[str, Any] = {"points": points}
        text = (
            f"{largest['replicas']} replicas train {largest['images_per_s'] / rate_of_one:.2f} times as many images a "
            f"second as one (weak: {points[-1]['images_per_s'] / rate_of_one:.2f})"
        )
        if computing:
            details["compute_s"] = max(computing)
            details["communication_s"] = max(0.0, largest["step_s"] - max(computing))
            step_ms, communication_ms = 1e3 * largest["step_s"], 1e3 * details["communication_s"]
            text += f"; of a step's {step_ms:.1f} ms, {communication_ms:.1f} go to communication"
        if first["shares_cores"]:
            text += "; not judged, since replicas share cores"
        noise = find_noise([one["noise"] for one in evidence])
        details["noise"] = noise
        return Finding("inconclusive" if noise else "info", f"{text} ({noise})" if noise else text, {}, details)


def _share(context: Context) -> Callable[[], float] | None:
    """A function that computes this process's share of the steps without communication; seconds a step."""
    if len(context.strategy.devices()) > 1:
        return None
    engine = context.assemble()
    watch = Stopwatch(engine.on(OneShare(context.strategy, index=context.topology.rank)))
    return lambda: watch.run(2) / watch.steps
