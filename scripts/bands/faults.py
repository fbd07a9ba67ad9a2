"""Faults that all ranks of a job would have in common, put into a training to see which numbers show them.

N replicas then agree with one replica, so only the bands of `mnist_dist.verify.bands` can notice. Nothing in the package
can turn a fault on: each is a change of the configuration, of the data, or of a part of an engine.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mnist_dist.data.splits import Splits
from mnist_dist.engine.batches import PADDING, BatchPlan
from mnist_dist.engine.build import Engine
from mnist_dist.engine.flat_model import FlatModel
from mnist_dist.engine.layers.dropout import BatchPosition
from mnist_dist.engine.optimizer import Adam, Optimizer, create_optimizer
from mnist_dist.engine.precision import LossScale
from mnist_dist.engine.programs.state import TrainState

Kind = Literal["must", "informs", "harmless"]
"""must: a used number must see it. informs: it is good to know what does. harmless: no fault, must stay inside."""


@dataclass(frozen=True)
class Fault:
    """A fault, by what it changes."""

    text: str
    """For the table."""
    kind: Kind = "must"
    overrides: tuple[str, ...] = ()
    """Keys of the configuration."""
    spoil_splits: Callable[[Splits, int], Splits] | None = None
    """Given the seed."""
    spoil_engine: Callable[[Engine], Engine] | None = None


def shuffle_labels(share: float) -> Callable[[Splits, int], Splits]:
    """A share of the training examples exchange their labels at random."""

    def spoil(splits: Splits, seed: int) -> Splits:
        generator = np.random.default_rng(seed)
        chosen = generator.choice(len(splits.train), round(share * len(splits.train)), replace=False)
        labels = splits.train.labels.copy()
        labels[chosen] = labels[generator.permutation(chosen)]
        return replace(splits, train=replace(splits.train, labels=labels))

    return spoil


def scale_images(factor: float) -> Callable[[Splits, int], Splits]:
    """Pixels in another range, in training and validation."""

    def spoil(splits: Splits, seed: int) -> Splits:
        del seed
        train, val = (replace(part, images=part.images * np.float32(factor)) for part in (splits.train, splits.val))
        return replace(splits, train=train, val=val)

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

    def split(self, weights: tf.Tensor) -> list[tf.Tensor]:
        """The rounded weights."""
        return super().split(round_to(weights, self.bits))

    def _call(self, weights: list[tf.Tensor], images: tf.Tensor, *, training: bool) -> tf.Tensor:
        return super()._call(weights, round_to(images, self.bits), training=training)


class CoarseLogitsModel(FlatModel):
    """Its loss is computed from logits in bfloat16."""

    def _call(self, weights: list[tf.Tensor], images: tf.Tensor, *, training: bool) -> tf.Tensor:
        return round_to(super()._call(weights, images, training=training), 8)


class FrozenMasksModel(FlatModel):
    """Its dropout draws the same masks at every step."""

    def training_logits(self, weights: list[tf.Tensor], images: tf.Tensor, position: BatchPosition) -> tf.Tensor:
        """As if every step were the first."""
        frozen = position._replace(global_step=tf.zeros_like(position.global_step))
        return super().training_logits(weights, images, frozen)


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

    def _apply(self, gradient: tf.Tensor, learning_rate: tf.Tensor, factors: Sequence[tf.Tensor]) -> None:
        super()._apply(self.spoil_gradient(gradient), learning_rate, factors)
        if self.spoil_weights is not None:
            self.weights.assign(self.spoil_weights(self.weights.read_value()))


def exchange_state(optimizer: type[Optimizer] | None = None, **attributes: Any) -> Callable[[Engine], Engine]:
    """Another state, with an optimizer of this class."""

    def spoil(engine: Engine) -> Engine:
        config = engine.config
        state = SpoiltState(
            engine.flat_model.get_weights(),
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


class SameOrderPlan(BatchPlan):
    """Every epoch has the order of the first."""

    def shuffled(self, *, seed: int, epoch: int) -> npt.NDArray[np.int32]:
        """As if the epoch were 1."""
        del epoch
        return super().shuffled(seed=seed, epoch=1)


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
        size = gradient.shape[0] // share
        return tf.concat([gradient[:-size], tf.zeros(size)], axis=0)

    return spoil


def skip_steps(engine: Engine) -> Engine:
    """See HaltingRate."""
    return replace(engine, learning_rate=HaltingRate(engine))  # type: ignore[arg-type]


FAULTS: dict[str, Fault] = {
    "rate_x2": Fault("learning rate x 2 (scaled by a world size of 2)", overrides=("optimizer.learning_rate=0.002",)),
    "rate_x4": Fault("learning rate x 4 (scaled by a world size of 4)", overrides=("optimizer.learning_rate=0.004",)),
    "rate_half": Fault("learning rate x 1/2", overrides=("optimizer.learning_rate=0.0005",)),
    "rate_x1.1": Fault("learning rate x 1.1", "informs", ("optimizer.learning_rate=0.0011",)),
    "batch_x2": Fault("global batch x 2 (each of 2 ranks takes a whole batch)", overrides=("batch.global_size=1024",)),
    "dropout_0": Fault("no dropout", overrides=("model.dropout=0",)),
    "dropout_0.2": Fault("dropout rate 0.2 in place of 0.4", overrides=("model.dropout=0.2",)),
    "dropout_0.6": Fault("dropout rate 0.6 (rates of keeping and dropping exchanged)", overrides=("model.dropout=0.6",)),
    "dropout_0.35": Fault("dropout rate 0.35", "informs", ("model.dropout=0.35",)),
    "masks": Fault("same dropout masks at every step", "informs", spoil_engine=exchange_model(FrozenMasksModel)),
    "labels_10": Fault("10 % of the labels shuffled", spoil_splits=shuffle_labels(0.1)),
    "labels_1": Fault("1 % of the labels shuffled", spoil_splits=shuffle_labels(0.01)),
    "pixels": Fault("pixels 0..255, not divided by 255", spoil_splits=scale_images(255)),
    "pixels_half": Fault("pixels 0..0.5", spoil_splits=scale_images(0.5)),
    "initial": Fault(
        "initial weights of glorot_normal, not he_normal", overrides=("model.kernel_initializer=glorot_normal",)
    ),
    "twice_half": Fault(
        "half of each batch seen twice, the other half never",
        "informs",
        spoil_engine=exchange_plan(RepeatingPlan, num_parts=2),
    ),
    "twice_eighth": Fault(
        "one shard of eight seen twice, another one never",
        "informs",
        spoil_engine=exchange_plan(RepeatingPlan, num_parts=8),
    ),
    "same_order": Fault("every epoch in the order of the first", "informs", spoil_engine=exchange_plan(SameOrderPlan)),
    "lost_tenth": Fault("the last tenth of the gradient lost", spoil_engine=exchange_state(spoil_gradient=lose_last(10))),
    "lost_half": Fault("the last half of the gradient lost", spoil_engine=exchange_state(spoil_gradient=lose_last(2))),
    "skipped": Fault("every tenth step skipped", "informs", spoil_engine=skip_steps),
    "beta_1": Fault("Adam without momentum (beta_1 = 0)", "informs", ("optimizer.beta_1=0",)),
    "beta_2": Fault("Adam with beta_2 = 0.9 in place of 0.999", "informs", ("optimizer.beta_2=0.9",)),
    "epsilon": Fault("Adam with epsilon = 1e-3 in place of 1e-7", overrides=("optimizer.epsilon=1e-3",)),
    "bias": Fault("Adam without correction of the bias", spoil_engine=exchange_state(UncorrectedAdam)),
    "bits_4": Fault(
        "weights and pixels in 4 significant bits (float8)",
        "informs",
        spoil_engine=exchange_model(CoarseModel, bits=4),
    ),
    "bits_2": Fault("weights and pixels in 2 significant bits", spoil_engine=exchange_model(CoarseModel, bits=2)),
    "stored_8": Fault(
        "weights stored in bfloat16, without a copy in float32",
        spoil_engine=exchange_state(spoil_weights=lambda weights: round_to(weights, 8)),
    ),
    "gradient_8": Fault(
        "gradient reduced in bfloat16",
        "informs",
        spoil_engine=exchange_state(spoil_gradient=lambda gradient: round_to(gradient, 8)),
    ),
    "gradient_16": Fault(
        "gradient in float16 without a loss scale",
        "informs",
        spoil_engine=exchange_state(spoil_gradient=lambda gradient: tf.cast(tf.cast(gradient, tf.float16), tf.float32)),
    ),
    "logits_8": Fault("loss computed in bfloat16", "informs", spoil_engine=exchange_model(CoarseLogitsModel)),
    "gradient_half": Fault(
        "gradient divided twice by 2 (Adam does not see a factor; the checks with SGD do)",
        "informs",
        spoil_engine=exchange_state(spoil_gradient=lambda gradient: gradient / 2),
    ),
    "tf32": Fault("weights and pixels in 11 significant bits (TF32)", "harmless", spoil_engine=exchange_model(CoarseModel, bits=11)),
    "shards": Fault("batch.num_shards=3", "harmless", ("batch.num_shards=3",)),
    "fast": Fault("reproducibility=fast", "harmless", ("reproducibility=fast",)),
    "xla": Fault("compile=xla", "harmless", ("compile=xla",)),
}
"""By the name in the files."""
