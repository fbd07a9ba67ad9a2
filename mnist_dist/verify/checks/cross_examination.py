"""Check 5: does each device compute right? All replicas compute the same shards, several times.

A device that does not repeat itself has a transient fault; one that repeats itself, but differs from the others, a
persistent one (as Megatron's rerun_state_machine.py tells them apart). Where only two differ, a third opinion decides:
the same gradient in float64 on the host's CPU.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from mnist_dist.base.array import Array
from mnist_dist.engine.build import Engine
from mnist_dist.engine.checksum import checksum, odd_factors
from mnist_dist.engine.flat_model import FlatModel
from mnist_dist.engine.programs.placement import DeviceArrays
from mnist_dist.engine.programs.train import StepInputs, TrainProgram
from mnist_dist.engine.reduction import ExactSum
from mnist_dist.strategy.base import SingleDevice
from mnist_dist.verify.checks.base import Detector, Evidence, Finding, by_replica, minority, names_of
from mnist_dist.verify.checks.equality import first_steps
from mnist_dist.verify.context import Context
from mnist_dist.verify.replicas import Boxes, join_sums

_BATCHES, _REPEATS = 2, 20
_ROUNDING = 1e-3
"""Relative distance of a gradient from that in float64: far more than rounding, far less than a wrong product."""


class CrossExamination(Detector):
    """Every replica computes all shard gradients of some batches, repeatedly."""

    name = "cross_examination"
    needs = ("identity", "data")

    def measure(self, context: Context) -> Evidence:
        """Digests by replica, repeat and shard; if two replicas disagree, distances from a third opinion."""
        engine = context.assemble()
        program, data = _program(engine)
        steps = [_step(engine, program, number) for number in range(_BATCHES)]
        context.enter("computing all shards")
        digests = _digests(engine, program, data, steps, repeats=context.repeats(_REPEATS, least=2))
        disputed = context.settle({"digests": digests}, _find_dispute)
        distances = []
        if disputed is not None:
            context.enter("asking for a third opinion")
            batch, shard = divmod(disputed, engine.shards.num_shards)
            distances = _distances(engine, program, data, steps[batch], shard)
        return {"digests": digests, "distances": distances, "shards": engine.shards.num_shards}

    def judge(self, evidence: Sequence[Evidence]) -> Finding:
        """Repeats must be equal, then replicas."""
        digests = by_replica(evidence, "digests")
        num_shards = evidence[0]["shards"]
        stable = [all(repeat == own[0] for repeat in own) for own in digests]
        usual = [[Counter(values).most_common(1)[0][0] for values in zip(*own, strict=True)] for own in digests]
        details = {
            "shards": num_shards,
            "digests": [[shorten(value) for value in own[:num_shards]] for own in usual],
            "repeats_equal": stable,
        }
        blamed = {
            index: "the same computation gave different results (a transient fault): "
            f"{_count_deviants(digests[index])} of {len(digests[index]) * len(usual[index])} gradients deviate"
            for index, is_stable in enumerate(stable)
            if not is_stable
        }
        if blamed:
            return Finding(
                "fail",
                f"{names_of(blamed, 'replica')} did not repeat a computation to the same bits",
                blamed,
                details,
                of="replica",
            )
        if all(own == usual[0] for own in usual):
            summary = (
                f"{len(usual)} replica(s) computed {len(usual[0])} shard gradients {len(digests[0])} times, "
                "all of them to the same bits"
            )
            return Finding("pass", summary, {}, details)
        odd = minority([tuple(own) for own in usual])
        text = "computes other gradients than the others (a persistent fault)"
        if odd is None:
            distances = by_replica(evidence, "distances")
            odd = [index for index, distance in enumerate(distances) if not distance < _ROUNDING]
            text = f"computes gradients that are further than {_ROUNDING:g} from those in float64 (a persistent fault)"
            details["distances"] = distances
        blamed = dict.fromkeys(odd, text)
        summary = f"{names_of(blamed, 'replica')} {text}" if blamed else (
            "the replicas differ in bits, each within rounding of float64: other hardware or libraries, or a fault in "
            "low bits"
        )  # fmt: skip
        return Finding("fail", summary, blamed, details, of="replica")

    def spoil(self, evidence: Sequence[Evidence]) -> int | None:
        """The last replica computes one gradient differently once."""
        evidence[-1]["digests"][-1][-1][-1] += 1
        return len(evidence) - 1


def shorten(number: int) -> str:
    """A 64-bit checksum, short enough for a table."""
    return f"{number & 0xFFFFFFFFFFFFFFFF:016x}"[:8]


def _count_deviants(own: Sequence[Sequence[int]]) -> int:
    return sum(len(values) - Counter(values).most_common(1)[0][1] for values in zip(*own, strict=True))


def _find_dispute(values: Sequence[dict[str, Any]]) -> int | None:
    """The first gradient about which stable replicas disagree without a majority; None if there is none."""
    digests = by_replica(values, "digests")
    if not all(repeat == own[0] for own in digests for repeat in own):
        return None
    firsts = [tuple(own[0]) for own in digests]
    if len(set(firsts)) == 1 or minority(firsts) is not None:
        return None
    return next(index for index, column in enumerate(zip(*firsts, strict=True)) if len(set(column)) > 1)


def _program(engine: Engine) -> tuple[TrainProgram, DeviceArrays]:
    split = engine.place_training_split()
    reduction = ExactSum(engine.strategy, engine.shards)
    return TrainProgram(
        engine.flat_model, engine.state, split=split, shards=engine.shards, reduction=reduction
    ), split.arrays


def _step(engine: Engine, program: TrainProgram, number: int) -> StepInputs:
    """What the program needs for one of the first steps."""
    indices = first_steps(engine, number + 1)[number:]
    inputs = program.step_inputs(indices, learning_rates=np.zeros(1))
    step: StepInputs = tf.nest.map_structure(lambda tensor: tensor[0], inputs)
    return step


def _digests(
    engine: Engine, program: TrainProgram, data: DeviceArrays, steps: Sequence[StepInputs], *, repeats: int
) -> list[list[list[int]]]:
    """For each replica of this process, for each repeat: digests of all batches' shards."""
    strategy, num_shards = engine.strategy, engine.shards.num_shards
    boxes = Boxes(strategy, np.zeros(num_shards, np.int64))
    factors = strategy.replicate(odd_factors(engine.flat_model.num_sums))

    def compute(data: DeviceArrays, factors: tf.Tensor, step: StepInputs) -> tf.Tensor:
        weights = engine.flat_model.split(*engine.state.read_model())
        sums = [program.shard_sums(range(shard, shard + 1), data, step, weights) for shard in range(num_shards)]
        return boxes.fill(tf.stack([checksum(join_sums(one), factors) for one in sums]))

    compiled = tf.function(lambda *args: strategy.run(compute, *args), autograph=False)
    found: list[list[list[int]]] = [[] for _ in strategy.devices()]
    for _ in range(repeats):
        parts = []
        for step in steps:
            compiled(data, factors, step)
            parts.append(boxes.read())
        for index, own in enumerate(found):
            own.append([int(value) for part in parts for value in part[index]])
    return found


def _distances(engine: Engine, program: TrainProgram, data: DeviceArrays, step: StepInputs, shard: int) -> list[float]:
    """Each replica's relative distance from the gradient in float64 on the CPU."""
    strategy, size = engine.strategy, engine.flat_model.num_sums
    boxes = Boxes(strategy, np.zeros(size, np.float32))

    def compute(data: DeviceArrays, step: StepInputs) -> tf.Tensor:
        weights = engine.flat_model.split(*engine.state.read_model())
        return boxes.fill(join_sums(program.shard_sums(range(shard, shard + 1), data, step, weights)))

    tf.function(lambda *args: strategy.run(compute, *args), autograph=False)(data, step)
    opinion = _third_opinion(engine, step, shard)
    return [float(np.linalg.norm(own - opinion) / np.linalg.norm(opinion)) for own in boxes.read()]


def _third_opinion(engine: Engine, step: StepInputs, shard: int) -> Array:
    """The sums of a shard, by products in float64 on this host's CPU."""
    cpu = SingleDevice(tf.config.list_logical_devices("CPU")[0].name)
    alone = engine.on(cpu)
    split = alone.place_training_split(dtype=tf.float64)
    flat_model = FlatModel(
        engine.model, image_shape=engine.splits.image_shape, seed=engine.config.seed, policy="float64"
    )
    reduction = ExactSum(cpu, engine.shards)
    program = TrainProgram(flat_model, alone.state, split=split, shards=engine.shards, reduction=reduction)
    weights = flat_model.split(*map(tf.constant, engine.vectors()))
    sums: Array = cpu.run(
        lambda: join_sums(program.shard_sums(range(shard, shard + 1), split.arrays, step, weights))
    ).numpy()
    return sums
