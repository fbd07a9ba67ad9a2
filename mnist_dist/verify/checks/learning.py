"""Checks 8 and 9: does the recipe learn as it does with other seeds, and in mixed precision as in float32?

Only this can see a fault that N replicas and one have in common: a wrong rate, wrong labels, wrong arithmetic.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import tensorflow as tf

from mnist_dist.config.compare import training_keys
from mnist_dist.engine.build import Engine
from mnist_dist.engine.programs.train import TrainProgram
from mnist_dist.engine.reduction import ExactSum, Sums
from mnist_dist.strategy.base import Strategy
from mnist_dist.verify.bands import NUMBERS, RUNS_TO_DECIDE, Bands, Judgement, find_bands, measure, subtract
from mnist_dist.verify.checks.base import Detector, Evidence, Finding, by_replica, names_of
from mnist_dist.verify.checks.equality import first_steps
from mnist_dist.verify.context import Context, digest
from mnist_dist.verify.trial import run_trial

_SEEDS_APART = 1_000_003  # so that neighbouring seeds of two jobs do not share their further trainings


class Learning(Detector):
    """Three epochs on all replicas, in float32."""

    name = "learning"
    needs = ("identity", "collectives", "data", "cross_examination", "exact")

    def why_not(self, context: Context) -> str:
        """There must be bands for this data set and configuration."""
        bands = _bands(_key(context))
        return bands if isinstance(bands, str) else ""

    def measure(self, context: Context) -> Evidence:
        """The numbers of one training, or of three if one does not decide."""
        key = _key(context)
        measured: list[dict[str, float]] = []
        for number in range(RUNS_TO_DECIDE):
            measured.append(_numbers(context, "float32", number))
            if not _needs_more(context, key, measured):
                break
        return {"key": key, "measured": measured, "history": context.trials[("float32", 0)]["history"]}

    def judge(self, evidence: Sequence[Evidence]) -> Finding:
        """Each number must be inside its band."""
        judgement = _judge(evidence[0])
        details = {"numbers": _rows(judgement), "history": evidence[0]["history"]}
        is_good = judgement.outcome == "inside"
        runs = f" (mean of {len(evidence[0]['measured'])} seeds)" if len(evidence[0]["measured"]) > 1 else ""
        return Finding("pass" if is_good else "fail", judgement.describe() + runs, {}, details)

    def spoil(self, evidence: Sequence[Evidence]) -> int | None:
        """All losses are twice as large."""
        _double(evidence)
        return None


class Precision(Detector):
    """The same in mixed precision, against float32 with the same seed; and one overflow on one replica."""

    name = "precision"
    needs = ("identity", "collectives", "data", "cross_examination", "exact", "learning")

    def measure(self, context: Context) -> Evidence:
        """Differences of numbers, if there are bands for them; and every replica's state around the overflow."""
        key = {**_key(context), "precision": context.mixed_precision, "paired": True}
        measured: list[dict[str, float]] = []
        while not isinstance(_bands(key), str) and len(measured) < RUNS_TO_DECIDE:
            number = len(measured)
            mixed = _numbers(context, context.mixed_precision, number)
            measured.append(subtract(mixed, _numbers(context, "float32", number)))
            if not _needs_more(context, key, measured):
                break
        context.enter("one overflow in float16")
        return {"key": key, "measured": measured, "overflow": _overflow(context)}

    def judge(self, evidence: Sequence[Evidence]) -> Finding:
        """Inside the paired band, and all replicas skip the same step and halve the scale."""
        states = by_replica(evidence, "overflow")
        usual = states[0]
        wrong = [index for index, state in enumerate(states) if not _skips_one_step(state) or state != usual]
        details: dict[str, Any] = {
            "overflow": {
                "skipped_on": [_skips_one_step(state) for state in states],
                "scale_before": usual[0]["scale"],
                "scale_after": usual[2]["scale"],
            }
        }
        scale_before, scale_after = usual[0]["scale"], usual[2]["scale"]
        scales = (
            f"an overflow on one replica: all skipped a step, the loss scale went {scale_before:g} to {scale_after:g}"
        )
        name = evidence[0]["key"]["precision"]
        text = f"no bands for {name}"
        if evidence[0]["measured"]:
            judgement = _judge(evidence[0])
            details["numbers"] = _rows(judgement)
            text = f"{name}: {judgement.describe()}"
            if judgement.outcome != "inside":
                return Finding("fail", text, {}, details)
        if wrong:
            odd = [index for index in wrong if not _skips_one_step(states[index])] or wrong
            blamed = dict.fromkeys(odd, "it did not skip just the step whose gradient overflowed")
            blamed = blamed if len(set(odd)) < len(states) else {}
            summary = f"after an overflow {names_of(odd, 'replica')} did not skip a step"
            return Finding("fail", summary, blamed, details, of="replica")
        return Finding("pass", f"{text}; {scales}", {}, details)

    def spoil(self, evidence: Sequence[Evidence]) -> int | None:
        """The last replica steps alone."""
        evidence[-1]["overflow"][-1][2]["updates"] += 1
        num_replicas = sum(len(one["overflow"]) for one in evidence)
        return len(evidence) - 1 if num_replicas > 1 else None


def _key(context: Context) -> dict[str, Any]:
    """What decides which bands apply; JSON values, so that a judge can look them up."""
    config = {key: value for key, value in asdict(context.config).items() if key not in _OWN_KEYS}
    return {
        "dataset": context.dataset.name,
        "sha256": context.dataset.sha256,
        "precision": "float32",
        "keys": training_keys(config),
        "paired": False,
    }


_OWN_KEYS = ("checks", "budget_s", "deadline_s", "reference", "strict")


def _bands(key: Mapping[str, Any]) -> Bands | str:
    return find_bands(key["dataset"], key["sha256"], key["precision"], key["keys"], paired=key["paired"])


def _judge(evidence: Mapping[str, Any]) -> Judgement:
    bands = _bands(evidence["key"])
    assert isinstance(bands, Bands), bands
    return bands.judge(evidence["measured"])


def _needs_more(context: Context, key: Mapping[str, Any], measured: list[dict[str, float]]) -> bool:
    """Whether one training does not decide; then it takes all three. Rank 0 decides, for all."""
    if 1 < len(measured) < RUNS_TO_DECIDE:
        return True
    context.enter("judging")
    answer: bool = context.settle(None, lambda _: _judge({"key": key, "measured": measured}).outcome == "needs_more")
    return answer


def _rows(judgement: Judgement) -> list[dict[str, Any]]:
    return [
        {"name": NUMBERS[found.name].text, "value": found.value, "low": found.low, "high": found.high,
         "mean": found.mean, "deviations": found.deviations}
        for found in judgement.numbers
    ]  # fmt: skip


def _double(evidence: Sequence[Evidence]) -> None:
    for one in evidence:
        one["measured"] = [{name: value + float(np.log(2)) for name, value in own.items()} for own in one["measured"]]


def _numbers(context: Context, precision: str, number: int) -> dict[str, float]:
    """Those of a training; each training is run once, for both checks."""
    if (precision, number) not in context.trials:
        context.enter(f"training in {precision}, seed {number + 1}")
        config = context.config
        seed = (config.seed + number * _SEEDS_APART) % 2**31
        engine = context.assemble(precision=replace(config.precision, name=precision), seed=seed)
        trial = run_trial(engine)
        history = [json.loads(json.dumps(asdict(row))) for row in trial.history.epochs]
        context.trials[(precision, number)] = {"numbers": measure(trial), "history": history}
    numbers: dict[str, float] = context.trials[(precision, number)]["numbers"]
    return numbers


# One overflow


class _Overflowing:
    """A reduction that is told by one replica, at one step, that its gradient is infinite."""

    def __init__(self, engine: Engine, *, replica: int, step: int) -> None:
        self._reduction = ExactSum(engine.strategy, engine.shards)
        self._engine, self._replica, self._step = engine, replica, step

    def __call__(self, sums: Sequence[Sums]) -> tf.Tensor:
        """The sum over all shards."""
        (first, *rest), *others = sums
        if self._engine.strategy.replica_index() == self._replica:
            is_due = self._engine.state.global_step.read_value() == self._step
            first = first + tf.where(is_due, np.inf, tf.constant(0.0))
        return self._reduction([[first, *rest], *others])


def _overflow(context: Context) -> list[list[dict[str, Any]]]:
    """For each replica of this process its state before and after each of three steps; the second one overflows."""
    config = context.config
    with context.hushed():  # oneDNN says that it leaves float16 on CPUs to others
        engine = context.assemble(precision=replace(config.precision, name="mixed_float16"))
        program = TrainProgram(
            engine.flat_model,
            engine.state,
            split=engine.place_training_split(dtype=engine.flat_model.compute_dtype),
            shards=engine.shards,
            reduction=_Overflowing(engine, replica=context.strategy.num_replicas - 1, step=1),
        )
        states = [_states(engine)]
        for indices in first_steps(engine, 3):
            program.run_epoch(indices[np.newaxis], learning_rates=np.full(1, config.optimizer.learning_rate))
            states.append(_states(engine))
    return [list(own) for own in zip(*states, strict=True)]


def _states(engine: Engine) -> list[dict[str, Any]]:
    strategy: Strategy = engine.strategy
    scales, updates, weights = (
        strategy.copies(variable)
        for variable in (engine.state.loss_scale, engine.state.num_updates, engine.state.weights)
    )
    return [
        {"scale": float(scale), "updates": int(number), "weights": digest(vector.tobytes())}
        for scale, number, vector in zip(scales, updates, weights, strict=True)
    ]


def _skips_one_step(states: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a replica made the first and the third step, skipped the second one, and then halved its scale."""
    before, first, second, third = states
    return (
        [state["updates"] for state in states] == [0, 1, 1, 2]
        and first["weights"] == second["weights"]
        and len({before["weights"], first["weights"], third["weights"]}) == 3
        and [first["scale"], second["scale"]] == [before["scale"], before["scale"] / 2]
    )
