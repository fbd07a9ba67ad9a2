"""Bands: within which bounds the numbers of a correct training of the recipe lie, whatever its seed.

Where all ranks share a fault, N replicas agree with one replica, and only what a training achieves can show it.
`bands.json` has the numbers of many trainings that differ only in their seeds, for each data set and precision; a new
training is judged by the prediction interval of each number. `docs/bands.md` says which faults that sees.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mnist_dist.config.compare import IMPLIED
from mnist_dist.results.history import History

EPOCHS = 3
ALPHA = 1e-4
"""How often a number of a correct training is outside its interval: 20 correct trainings must pass 20 times."""
FAR = 1.5
"""Beyond this many times the bound one training decides; between the two, the mean of `RUNS_TO_DECIDE`."""
RUNS_TO_DECIDE = 3
EARLY_STEPS = slice(1, 25)
"""The second to the 25th step: the first one is computed with the initial weights."""

# What the numbers do not depend on, beyond the last bits (docs/bands.md: measured), and the seed.
_FREE_KEYS = ("seed", "data.name", "precision.", "reproducibility", "compile", "batch.num_shards")

Outcome = Literal["inside", "outside", "needs_more"]


@dataclass(frozen=True)
class Trial:
    """What a training of `EPOCHS` epochs has shown."""

    step_losses: tuple[npt.NDArray[np.float64], ...]
    """For each epoch, (steps,): the sum of the losses of a step's examples."""
    batch_size: int
    """Examples of a step, except the last one of an epoch."""
    history: History
    num_val: int
    """Examples of the validation split."""


@dataclass(frozen=True)
class Number:
    """A number of a training that might be judged, on a scale where it is nearer to normally distributed."""

    text: str
    stage: Literal["training", "validation"]
    of: Callable[[Trial], float]
    """The transformed number."""
    show: Callable[[float], str]
    """A transformed number as people know it."""
    show_difference: Callable[[float], str]
    """The difference of two transformed numbers."""


def _loss(text: str, stage: Literal["training", "validation"], of: Callable[[Trial], float]) -> Number:
    def transformed(trial: Trial) -> float:
        return _log(of(trial))

    return Number(text, stage, transformed, lambda x: f"{math.exp(x):.4f}", lambda x: f"x {math.exp(x):.4f}")


def _log(loss: float) -> float:
    return math.log(loss) if loss > 0 and math.isfinite(loss) else math.nan


def _epoch_loss(epoch: int) -> Number:
    return _loss(f"training loss of epoch {epoch}", "training", lambda trial: trial.history.epochs[epoch - 1].loss)


def _val_loss(epoch: int) -> Number:
    return _loss(
        f"validation loss after epoch {epoch}", "validation", lambda trial: trial.history.epochs[epoch - 1].val_loss
    )


def _steps_loss(trial: Trial, steps: slice) -> float:
    losses = trial.step_losses[0][steps]
    return float(losses.sum()) / (len(losses) * trial.batch_size)


def logit_of_count(count: int, total: int) -> float:
    """The logit of an accuracy, finite also for none and all (Haldane 1956 and Anscombe 1956 add one half)."""
    return math.log((count + 0.5) / (total - count + 0.5))


def _val_correct(trial: Trial) -> float:
    return logit_of_count(round(trial.history.epochs[EPOCHS - 1].val_accuracy * trial.num_val), trial.num_val)


NUMBERS: dict[str, Number] = {
    "early_loss": _loss(
        f"training loss of steps {EARLY_STEPS.start + 1} to {EARLY_STEPS.stop}",
        "training",
        lambda trial: _steps_loss(trial, EARLY_STEPS),
    ),
    "later_loss": _loss(
        f"training loss of epoch 1 from step {EARLY_STEPS.stop + 1} on",
        "training",
        # The last step may be a short one.
        lambda trial: _steps_loss(trial, slice(EARLY_STEPS.stop, -1)),
    ),
    **{f"loss_{epoch}": _epoch_loss(epoch) for epoch in range(1, EPOCHS + 1)},
    **{f"val_loss_{epoch}": _val_loss(epoch) for epoch in range(1, EPOCHS + 1)},
    "val_correct": Number(
        f"correct in validation after epoch {EPOCHS}",
        "validation",
        _val_correct,
        lambda x: f"{100 / (1 + math.exp(-x)):.2f} %",
        lambda x: f"odds x {math.exp(x):.4f}",
    ),
}
"""Those that were tried, by name; the bands have those that proved useful."""


def measure(trial: Trial) -> dict[str, float]:
    """All numbers of a training, transformed; NaN for a loss that is no positive number."""
    return {name: number.of(trial) for name, number in NUMBERS.items()}


def subtract(ours: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, float]:
    """The differences to another training with the same seed, for paired bands."""
    return {name: value - reference[name] for name, value in ours.items()}


@dataclass(frozen=True)
class Band:
    """A number's distribution over seeds, as far as known from `num_seeds` of them."""

    name: str
    mean: float
    std: float
    """With num_seeds - 1 in the denominator."""
    num_seeds: int

    def half_width(self, num_runs: int = 1) -> float:
        """Of the two-sided prediction interval for the mean of `num_runs` new trainings: t(n-1) s sqrt(1/k + 1/n).

        Hahn and Meeker, Statistical Intervals (1991), sections 4.7 and 4.8; at level 1 - `ALPHA`, for normal numbers.
        """
        from scipy.special import stdtrit  # the quantile of Student's t; here, as it takes a while to import

        t = float(stdtrit(self.num_seeds - 1, 1 - ALPHA / 2))
        return t * self.std * math.sqrt(1 / num_runs + 1 / self.num_seeds)


@dataclass(frozen=True)
class Finding:
    """One number of the trainings that were judged; transformed numbers."""

    name: str
    value: float
    """The mean, of several trainings."""
    low: float
    high: float
    """The interval for it."""
    mean: float
    """Over the seeds of the band."""
    deviations: float
    """From `mean`, in standard deviations of a single training."""
    outcome: Outcome


@dataclass(frozen=True)
class Judgement:
    """Whether trainings are like those of the bands."""

    outcome: Outcome
    numbers: tuple[Finding, ...]
    paired: bool

    def describe(self) -> str:
        """In a sentence: the number that is furthest from its mean."""

        def distance(found: Finding) -> float:
            return abs(found.deviations) if math.isfinite(found.deviations) else math.inf

        worst = max(self.numbers, key=distance)
        number = NUMBERS[worst.name]
        show = number.show_difference if self.paired else number.show
        place = {"inside": "within", "outside": "outside", "needs_more": "just outside"}[worst.outcome]
        return (
            f"{number.text}{', against float32' if self.paired else ''}: {show(worst.value)}, {place} "
            f"{show(worst.low)} to {show(worst.high)} ({worst.deviations:+.1f} standard deviations)"
        )


@dataclass(frozen=True)
class Bands:
    """What to expect of trainings on one data set in one precision; or of the differences between two precisions."""

    bands: tuple[Band, ...]
    paired: bool = False
    """Whether they are for differences (`subtract`) to float32 with the same seed."""

    def judge(self, measured: Sequence[Mapping[str, float]]) -> Judgement:
        """Judge one training, or `RUNS_TO_DECIDE` by their mean; then `needs_more` is no longer possible.

        A number that is not finite is outside.
        """
        if not measured:
            raise ValueError("nothing to judge")
        found = tuple(self._find(band, [numbers[band.name] for numbers in measured]) for band in self.bands)
        outcomes = {finding.outcome for finding in found}
        outcome: Outcome = (
            "outside" if "outside" in outcomes else "needs_more" if "needs_more" in outcomes else "inside"
        )
        return Judgement(outcome, found, self.paired)

    def _find(self, band: Band, values: Sequence[float]) -> Finding:
        value = sum(values) / len(values)
        bound = band.half_width(len(values))
        distance = abs(value - band.mean)
        outcome: Outcome = "outside"
        if distance <= bound:
            outcome = "inside"
        elif len(values) < RUNS_TO_DECIDE and distance <= FAR * bound:
            outcome = "needs_more"
        return Finding(
            band.name,
            value,
            low=band.mean - bound,
            high=band.mean + bound,
            mean=band.mean,
            deviations=(value - band.mean) / band.std,
            outcome=outcome,
        )


def find_bands(
    dataset_name: str, data_sha256: str, precision: str, keys: Mapping[str, str], *, paired: bool = False
) -> Bands | str:
    """The bands for a training, or in words why there are none.

    Args:
        dataset_name: for the reason only; the digest tells the data.
        data_sha256: digest of the data set.
        precision: the policy, without `auto`.
        keys: those that the training depends on (`config.compare.training_keys`).
        paired: for the differences to float32 with the same seed, rather than for the precision by itself.
    """
    stored = load_stored()
    known = {entry["sha256"]: entry["dataset"] for entry in stored["bands"]}
    if data_sha256 not in known:
        made_from = " and ".join(dict.fromkeys(known.values()))
        return f"there are bands for {made_from} only, and these images ({dataset_name}) are neither of them" + (
            f": digest {data_sha256:.12}" if dataset_name in known.values() else ""
        )
    if different := _differences(recipe_keys({**IMPLIED, **stored["recipe"]}), recipe_keys(keys)):
        return f"the bands are for the default recipe only: {different}"
    for entry in stored["bands"]:
        if (entry["sha256"], entry["precision"], entry["paired"]) == (data_sha256, precision, paired):
            bands = [
                Band(name, number["mean"], number["std"], entry["num_seeds"])
                for name, number in entry["numbers"].items()
                if number["used"]
            ]
            return Bands(tuple(bands), paired)
    return f"there are no bands for precision={precision}{' against float32' if paired else ''}"


def recipe_keys(keys: Mapping[str, str]) -> dict[str, str]:
    """Those of a training's keys that the bands depend on."""
    return {key: value for key, value in keys.items() if not key.startswith(_FREE_KEYS)}


def _differences(expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    """In words, empty if there are none."""
    keys = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    return ", ".join(f"{key}={found.get(key, 'none')} rather than {expected.get(key, 'none')}" for key in keys)


@lru_cache(maxsize=1)
def load_stored() -> dict[str, Any]:
    """The content of `bands.json`, which comes with the package; and in its recipe what newer keys mean."""
    text = resources.files("mnist_dist.verify").joinpath("bands.json").read_text("utf-8")
    stored: dict[str, Any] = json.loads(text)
    return {**stored, "recipe": recipe_keys(IMPLIED | stored["recipe"])}
