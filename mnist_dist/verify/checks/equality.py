"""Checks 6 and 7: do N replicas train as one does, to the last bit, or in fast mode within rounding?"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mnist_dist.base.array import Array
from mnist_dist.engine.build import Engine, Programs
from mnist_dist.engine.programs.train import TrainProgram
from mnist_dist.engine.reduction import Sums
from mnist_dist.verify.checks.base import Detector, Evidence, Finding, by_replica, minority, names_of
from mnist_dist.verify.context import SGD, Context, digest
from mnist_dist.verify.replicas import join_sums

STEPS = 25
_ORDERS = 8
_FACTOR = 8.0


def one_replica(context: Context) -> str:
    """The reason not to compare N replicas with one, if there is just one."""
    return "" if context.strategy.num_replicas > 1 else "there is just one replica"


def first_steps(engine: Engine, number: int) -> npt.NDArray[np.int32]:
    """The indices of the first steps of a training, over as many epochs as they need."""
    num_epochs = -(-number // engine.plan.steps_per_epoch)
    epochs = [engine.plan.shuffled(seed=engine.config.seed, epoch=1 + epoch) for epoch in range(num_epochs)]
    return np.concatenate(epochs)[:number]


def rates(engine: Engine, number: int) -> npt.NDArray[np.float64]:
    """The learning rates of these steps."""
    return engine.learning_rate.at(np.arange(number))


def state_digests(engine: Engine) -> list[str]:
    """A digest of weights and slots for each replica of this process."""
    vectors = [engine.strategy.copies(vector) for vector in (*engine.state.model, *engine.state.slots)]
    return [digest(b"".join(copy.tobytes() for copy in copies)) for copies in zip(*vectors, strict=True)]


class Exact(Detector):
    """The same steps on all replicas and, on each rank, on one alone: with SGD, which shows a wrong scale, and Adam."""

    name = "exact"
    needs = ("identity", "collectives", "data", "cross_examination")

    def why_not(self, context: Context) -> str:
        """One replica has nothing to be compared with."""
        return one_replica(context)

    def measure(self, context: Context) -> Evidence:
        """Losses and digests of both, for both optimizers."""
        runs = []
        for name, optimizer in (("sgd", SGD), ("adam", context.config.optimizer)):
            context.enter(f"{STEPS} steps of {name}")
            losses, states = _train(context.assemble(optimizer=optimizer))
            context.enter(f"{STEPS} steps of {name} on one replica")
            reference_losses, (reference,) = _train(context.assemble(context.alone(), optimizer=optimizer))
            runs.append(
                {"optimizer": name, "losses": losses, "states": states,
                 "reference_losses": reference_losses, "reference": reference}
            )  # fmt: skip
        return {"runs": runs, "num_local": len(context.strategy.devices())}

    def judge(self, evidence: Sequence[Evidence]) -> Finding:
        """All digests must be equal; otherwise the first step that differs is told."""
        shown = []
        problem: Finding | None = None
        for number, first in enumerate(evidence[0]["runs"]):
            runs = [one["runs"][number] for one in evidence]
            states = by_replica(runs, "states")
            references = [run["reference"] for run in runs]
            step = _first_difference(first)
            shown.append({**{key: first[key] for key in ("optimizer", "losses", "reference_losses")},
                          "first_difference": step})  # fmt: skip
            if len({*states, *references}) == 1 or problem is not None:
                continue
            name = first["optimizer"]
            if len(set(references)) > 1:
                text = f"training alone with {name} it gets other weights than the others alone"
                blamed = dict.fromkeys(minority(references) or (), text)
                problem = Finding("fail", f"the ranks alone do not train {name} to the same bits", blamed)
                continue
            wrong = [index for index, state in enumerate(states) if state != references[0]]
            everyone = len(wrong) == len(states)
            text = f"after {STEPS} steps of {name} its weights or slots are not those of one replica"
            blamed = {} if everyone else dict.fromkeys(wrong, text)
            who = "all replicas" if everyone else names_of(blamed, "replica")
            when = f"from step {step} on" if step is not None else f"by the end of {STEPS} steps"
            problem = Finding("fail", f"{who} differ with {name} from one replica {when}", blamed, of="replica")
        if problem is not None:
            return replace(problem, details={"runs": shown})
        num_replicas = sum(one["num_local"] for one in evidence)
        summary = f"{STEPS} steps of SGD and of Adam: the same bits on {num_replicas} replicas as on one"
        return Finding("pass", summary, {}, {"runs": shown})

    def spoil(self, evidence: Sequence[Evidence]) -> int | None:
        """Other slots on the last replica."""
        evidence[-1]["runs"][-1]["states"][-1] = "spoiled"
        return len(evidence) - 1 if sum(one["num_local"] for one in evidence) > 1 else None


def _train(engine: Engine) -> tuple[list[float], list[str]]:
    """Mean losses of the first steps, and digests of the state after them."""
    programs = Programs(engine)
    sums = programs.train_epoch(first_steps(engine, STEPS), learning_rates=rates(engine, STEPS))
    return [float(loss) / engine.plan.global_batch_size for loss in sums.losses], state_digests(engine)


def _first_difference(run: dict[str, Any]) -> int | None:
    """The step, counted from 1, whose update differs first, as the loss of the one after it shows."""
    pairs = zip(run["losses"], run["reference_losses"], strict=True)
    later = next((number for number, (one, other) in enumerate(pairs) if one != other), None)
    return None if later is None else max(1, later)


class Fast(Detector):
    """`reproducibility=fast` may change the last bits, as another order of summation does, and no more.

    On one replica too, which adds rows up in other groups than `exact`, and may be compiled otherwise.
    """

    name = "fast"
    needs = ("identity", "collectives", "data", "cross_examination")

    def measure(self, context: Context) -> Evidence:
        """The distance of the weights after some steps from those of one replica; on rank 0 that of other orders."""
        context.enter(f"{STEPS} steps in fast mode")
        fast = context.assemble(optimizer=SGD, reproducibility="fast", compile=context.fast_compiler)
        Programs(fast).train_epoch(first_steps(fast, STEPS), learning_rates=rates(fast, STEPS))
        copies = context.strategy.copies(fast.state.weights)
        # Each rank by itself, since weights are too many to send.
        context.enter("the same in other orders of summation, on one replica")
        alone = context.assemble(context.alone(), optimizer=SGD)
        orders = [list(range(alone.shards.num_shards))]
        generator = np.random.default_rng(0)
        if context.topology.is_chief:
            orders += [generator.permutation(alone.shards.num_shards).tolist() for _ in range(_ORDERS)]
        reference, *others = _train_in_orders(alone, orders)
        return {
            "distances": [float(np.linalg.norm(copy - reference)) for copy in copies],
            "noise": [float(np.linalg.norm(other - reference)) for other in others],
            "moved": float(np.linalg.norm(reference - alone.flat_model.get_weights())),
            "xla": fast.compiled_by_xla,
        }

    def judge(self, evidence: Sequence[Evidence]) -> Finding:
        """At most some times the noise."""
        distances = by_replica(evidence, "distances")
        noise, moved = evidence[0]["noise"], evidence[0]["moved"]
        usual = float(np.sqrt(np.mean(np.square(noise))))
        limit = _FACTOR * usual
        far = [index for index, distance in enumerate(distances) if not distance <= limit]
        details = {
            "distance": max(distances),
            "noise": noise,
            "limit": limit,
            "moved": moved,
            "xla": evidence[0]["xla"],
        }
        shown = f"{max(distances) / usual:.1f} times the noise of {len(noise)} orders of summation"
        if not far:
            return Finding("pass", f"the weights are {shown} away from one replica's (limit {_FACTOR:g})", {}, details)
        blamed = {} if len(far) == len(distances) else {
            index: f"in fast mode its weights are {distances[index] / usual:.0f} times the noise away"
            for index in far
        }  # fmt: skip
        return Finding(
            "fail",
            f"the weights are {shown} away from one replica's; the limit is {_FACTOR:g}",
            blamed,
            details,
            of="replica",
        )

    def spoil(self, evidence: Sequence[Evidence]) -> int | None:
        """The last replica is a thousandth of the way of the weights off."""
        evidence[-1]["distances"][-1] += 1e-3 * evidence[0]["moved"]
        return len(evidence) - 1 if len(evidence) > 1 else None


class _InOrder:
    """Adds the shards up one after another, in an order that may change between calls."""

    def __init__(self, order: tf.Variable) -> None:
        self._order = order

    def __call__(self, sums: Sequence[Sums]) -> tf.Tensor:
        """The sum over all shards of one replica."""
        rows = tf.gather(tf.stack([join_sums(one) for one in sums]), self._order.read_value())
        total, *others = tf.unstack(rows)
        for row in others:
            total = total + row
        return total


def _train_in_orders(engine: Engine, orders: Sequence[Sequence[int]]) -> list[Array]:
    """The weights that one replica gets in these orders of summation, each from the beginning."""
    order = engine.strategy.create_variable(np.arange(engine.shards.num_shards))
    program = TrainProgram(
        engine.flat_model,
        engine.state,
        split=engine.place_training_split(),
        shards=engine.shards,
        reduction=_InOrder(order),
    )
    start, results = engine.state.to_arrays(), []
    for numbers in orders:
        order.assign(numbers)
        for name, variable in engine.state.variables.items():
            variable.assign(start[name])
        program.run_epoch(first_steps(engine, STEPS), learning_rates=rates(engine, STEPS))
        results.append(engine.weights().copy())
    return results
