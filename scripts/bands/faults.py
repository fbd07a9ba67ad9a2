"""Faults that all ranks of a job would have in common, put into a training to see which numbers show them.

N replicas then agree with one replica, so only the bands of `mnist_dist.verify.bands` can notice. Nothing in the
package can turn a fault on: each is a change of the configuration, of the data, or of a part of an engine.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mnist_dist.data.splits import SplitName, Splits
from mnist_dist.engine.batches import PADDING, BatchPlan
from mnist_dist.engine.build import Engine
from mnist_dist.engine.flat_model import FlatModel, TrainingPass, Weights
from mnist_dist.engine.layers.position import BatchPosition, BatchRows
from mnist_dist.engine.optimizer import Adam, Optimizer, create_optimizer
from mnist_dist.engine.precision import LossScale
from mnist_dist.engine.programs.state import TrainState

Kind = Literal["must", "informs", "harmless"]
"""must: a used number must see it. informs: it is good to know what does. harmless: no fault, must stay inside."""


Stage = Literal["training", "validation"]
"""Where it sits: what goes wrong in validation cannot show in the training losses."""


@dataclass(frozen=True)
class Fault:
    """A fault, by what it changes."""

    text: str
    """For the table."""
    stage: Stage = "training"
    kind: Kind = "must"
    overrides: tuple[str, ...] = ()
    """Keys of the configuration."""
    spoil_splits: Callable[[Splits, int], Splits] | None = None
    """Given the seed."""
    spoil_engine: Callable[[Engine], Engine] | None = None
    in_mixed: bool = False
    """Whether it is tried in mixed precision too; most faults would move the numbers there just as far."""


def shuffle_labels(share: float, name: SplitName = "train") -> Callable[[Splits, int], Splits]:
    """A share of the examples of a split exchange their labels at random."""

    def spoil(splits: Splits, seed: int) -> Splits:
        generator, split = np.random.default_rng(seed), splits[name]
        chosen = generator.choice(len(split), round(share * len(split)), replace=False)
        labels = split.labels.copy()
        labels[chosen] = labels[generator.permutation(chosen)]
        return replace(splits, **{name: replace(split, labels=labels)})

    return spoil


def scale_images(factor: float, *names: SplitName) -> Callable[[Splits, int], Splits]:
    """Pixels of these splits in another range."""

    def spoil(splits: Splits, seed: int) -> Splits:
        del seed
        changed = {name: replace(splits[name], images=splits[name].images * np.float32(factor)) for name in names}
        return replace(splits, **changed)

    return spoil


def round_to(values: tf.Tensor, bits: int) -> tf.Tensor:
    """Float32 numbers rounded to that many significant bits (24 is float32, 11 TF32, 8 bfloat16, 4 float8)."""
    dropped = 24 - bits
    whole = tf.bitcast(tf.cast(values, tf.float32), tf.int32) + (1 << dropped - 1)
    rounded = tf.bitwise.bitwise_and(whole, tf.constant(-(1 << dropped), tf.int32))
    return tf.cast(tf.bitcast(rounded, tf.float32), values.dtype)


class CoarseModel(FlatModel):
    """Its products read weights and images that are rounded to a few significant bits."""

    bits: int

    def split(self, *vectors: tf.Tensor) -> Weights:
        """The rounded weights."""
        return super().split(*(round_to(vector, self.bits) for vector in vectors))

    def _call(self, weights: Weights, images: tf.Tensor, **options: bool) -> tuple[Any, ...]:
        return super()._call(weights, round_to(images, self.bits), **options)


class FrozenMasksModel(FlatModel):
    """Its dropout draws the same masks at every step."""

    def training_pass(self, weights: Weights, images: tf.Tensor, rows: BatchRows) -> TrainingPass:
        """As if every step were the first."""
        frozen = rows.position._replace(global_step=tf.zeros_like(rows.position.global_step))
        return super().training_pass(weights, images, replace(rows, position=frozen))


class NoisyEvaluationModel(FlatModel):
    """Its dropout is active during evaluation too."""

    def logits(self, weights: Weights, images: tf.Tensor) -> tf.Tensor:
        """As in the first training step."""
        first, num_rows = BatchPosition(tf.constant(0, tf.int64), tf.constant(0, tf.int64)), images.shape[0]
        return self.training_pass(weights, images, BatchRows(first, tf.ones(num_rows), num_rows)).logits


def exchange_model(kind: type[FlatModel], **attributes: Any) -> Callable[[Engine], Engine]:
    """Another flat model around the same network."""

    def spoil(engine: Engine) -> Engine:
        model = kind(engine.model, seed=engine.config.seed, policy=engine.config.precision.name)
        vars(model).update(attributes)
        return replace(engine, flat_model=model)

    return spoil


class SpoiltState(TrainState):
    """Its gradients, or its weights after an update, are spoilt."""

    spoil_gradient: Callable[[tf.Tensor], tf.Tensor] = staticmethod(lambda gradient: gradient)
    spoil_weights: Callable[[tf.Tensor], tf.Tensor] | None = None

    def _apply(self, gradient: tf.Tensor, *step: Any) -> None:
        super()._apply(self.spoil_gradient(gradient), *step)
        if self.spoil_weights is not None:
            self.weights.assign(self.spoil_weights(self.weights.read_value()))


def exchange_state(optimizer: type[Optimizer] | None = None, **attributes: Any) -> Callable[[Engine], Engine]:
    """Another state, with an optimizer of this class."""

    def spoil(engine: Engine) -> Engine:
        config = engine.config
        state = SpoiltState(
            engine.flat_model.vectors(),
            optimizer=optimizer(config.optimizer) if optimizer else create_optimizer(config.optimizer),
            loss_scale=LossScale(config.precision),
            strategy=engine.strategy,
        )
        vars(state).update(attributes)
        return replace(engine, state=state)

    return spoil


class UncorrectedAdam(Adam):
    """Adam whose correction of the first averages' bias has no effect, as if it had made many updates before."""

    def factors(self, num_updates: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Those after endless updates."""
        return tuple(tf.zeros_like(factor) for factor in super().factors(num_updates))


class RepeatingPlan(BatchPlan):
    """A part of each batch is computed twice, in the place of another part of the same size."""

    num_parts: int

    def shuffled(self, *, seed: int, epoch: int) -> npt.NDArray[np.int32]:
        """The second of the parts is the first one again."""
        rows = super().shuffled(seed=seed, epoch=epoch)
        size = self.global_batch_size // self.num_parts
        first, second = rows[:, :size], rows[:, size : 2 * size]
        second[...] = np.where(second == PADDING, PADDING, first)
        return rows


def exchange_plan(kind: type[BatchPlan], **attributes: Any) -> Callable[[Engine], Engine]:
    """Another plan of the same sizes."""

    def spoil(engine: Engine) -> Engine:
        plan = kind(**dataclasses.asdict(engine.plan))
        vars(plan).update(attributes)
        return replace(engine, plan=plan)

    return spoil


class HaltingRate:
    """The learning rate is 0 at every tenth step, as if that step were skipped."""

    def __init__(self, engine: Engine) -> None:
        self._rate = engine.learning_rate

    def at(self, steps: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """The rates of these steps."""
        return np.where(steps % 10 == 9, 0.0, self._rate.at(steps))


def lose_last(share: int) -> Callable[[tf.Tensor], tf.Tensor]:
    """The last of so many equal parts of the gradient arrives as zeros."""

    def spoil(gradient: tf.Tensor) -> tf.Tensor:
        size = tf.size(gradient)
        return tf.where(tf.range(size) < size - size // share, gradient, 0.0)

    return spoil


def skip_steps(engine: Engine) -> Engine:
    """See HaltingRate."""
    return replace(engine, learning_rate=HaltingRate(engine))  # type: ignore[arg-type]


_IN_MIXED = (
    *(
        "rate_x2",
        "rate_half",
        "dropout_0",
        "dropout_0.6",
        "labels_1",
        "lost_tenth",
        "val_labels_1",
        "val_dropout",
        "val_pixels",
    ),
    *("stored_8", "bits_4", "gradient_8", "fast", "xla"),
)


def _faults() -> dict[str, Fault]:
    rate, dropout = "optimizer.learning_rate=", "model.dropout="
    model, state, plan = exchange_model, exchange_state, exchange_plan

    def half(gradient: tf.Tensor) -> tf.Tensor:
        return gradient / 2

    def stored(bits: int) -> Callable[[Engine], Engine]:
        return state(spoil_weights=lambda weights: round_to(weights, bits))

    must = {
        "rate_x2": Fault("learning rate x 2 (scaled by a world size of 2)", overrides=(f"{rate}0.002",)),
        "rate_x4": Fault("learning rate x 4", overrides=(f"{rate}0.004",)),
        "rate_half": Fault("learning rate x 1/2", overrides=(f"{rate}0.0005",)),
        "batch_x2": Fault("global batch x 2", overrides=("batch.global_size=1024",)),
        "dropout_0": Fault("no dropout", overrides=(f"{dropout}0",)),
        "dropout_0.2": Fault("dropout rate 0.2, not 0.4", overrides=(f"{dropout}0.2",)),
        "dropout_0.6": Fault("dropout rate 0.6 (dropped and kept exchanged)", overrides=(f"{dropout}0.6",)),
        "labels_10": Fault("10 % of the labels shuffled", spoil_splits=shuffle_labels(0.1)),
        "labels_1": Fault("1 % of the labels shuffled", spoil_splits=shuffle_labels(0.01)),
        "pixels": Fault("pixels not divided by 255", spoil_splits=scale_images(255, "train", "val")),
        "lost_tenth": Fault("last tenth of the gradient lost", spoil_engine=state(spoil_gradient=lose_last(10))),
        "epsilon": Fault("Adam: epsilon 1e-3, not 1e-7", overrides=("optimizer.epsilon=1e-3",)),
        "bias": Fault("Adam: bias of the averages not corrected", spoil_engine=state(UncorrectedAdam)),
        "stored_4": Fault("weights stored in 4 significant bits (float8)", spoil_engine=stored(4)),
    }
    validation = {
        "val_labels_10": Fault(
            "10 % of the validation labels shuffled", "validation", spoil_splits=shuffle_labels(0.1, "val")
        ),
        "val_labels_1": Fault(
            "1 % of the validation labels shuffled", "validation", spoil_splits=shuffle_labels(0.01, "val")
        ),
        "val_pixels": Fault("validation pixels not divided", "validation", spoil_splits=scale_images(255, "val")),
        "val_dropout": Fault("dropout during validation", "validation", spoil_engine=model(NoisyEvaluationModel)),
    }
    informing: dict[str, dict[str, Any]] = {
        "rate_x1.1": {"text": "learning rate x 1.1", "overrides": (f"{rate}0.0011",)},
        "masks": {"text": "same dropout masks at every step", "spoil_engine": model(FrozenMasksModel)},
        "twice_half": {
            "text": "half of each batch twice, the rest never",
            "spoil_engine": plan(RepeatingPlan, num_parts=2),
        },
        "twice_eighth": {
            "text": "one shard of 8 twice, another never",
            "spoil_engine": plan(RepeatingPlan, num_parts=8),
        },
        "skipped": {"text": "every tenth step skipped", "spoil_engine": skip_steps},
        "beta_2": {"text": "Adam: beta_2 = 0.9, not 0.999", "overrides": ("optimizer.beta_2=0.9",)},
        "stored_8": {"text": "weights stored in bfloat16 only", "spoil_engine": stored(8)},
        "bits_4": {"text": "products of 4 significant bits", "spoil_engine": model(CoarseModel, bits=4)},
        "gradient_8": {
            "text": "gradient reduced in bfloat16",
            "spoil_engine": state(spoil_gradient=lambda g: round_to(g, 8)),
        },
        "gradient_half": {"text": "gradient divided by 2 once more", "spoil_engine": state(spoil_gradient=half)},
    }
    harmless: dict[str, dict[str, Any]] = {
        "shards": {"text": "batch.num_shards=3", "overrides": ("batch.num_shards=3",)},
        "fast": {"text": "reproducibility=fast", "overrides": ("reproducibility=fast",)},
        "xla": {"text": "compile=xla", "overrides": ("compile=xla",)},
    }
    found = {
        **must,
        **validation,
        **{name: Fault(kind="informs", **values) for name, values in informing.items()},
        **{name: Fault(kind="harmless", **values) for name, values in harmless.items()},
    }
    return {name: replace(fault, in_mixed=name in _IN_MIXED) for name, fault in found.items()}


FAULTS = _faults()
"""By the name in the records."""


def faults_in(precision: str) -> list[str]:
    """The names of those that are tried in a precision."""
    return [name for name, fault in FAULTS.items() if fault.in_mixed or precision == "float32"]
