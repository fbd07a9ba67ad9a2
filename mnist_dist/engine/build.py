"""The engine: everything that a training needs, from the configuration and data to programs that are ready to run."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mnist_dist.base.array import Array
from mnist_dist.base.errors import UserError
from mnist_dist.base.versions import imported_versions
from mnist_dist.config.model import KerasConfig
from mnist_dist.config.rules import shorten
from mnist_dist.config.train import TrainConfig
from mnist_dist.data.splits import SPLIT_NAMES, SplitName, Splits
from mnist_dist.engine.actions import EpochAction
from mnist_dist.engine.augment import Augmentation, create_augmentation
from mnist_dist.engine.batches import BatchPlan
from mnist_dist.engine.flat_model import FlatModel, FloatArray
from mnist_dist.engine.learning_rate import LearningRate
from mnist_dist.engine.mode import choose_compiler, choose_mode
from mnist_dist.engine.network import build_network, check_same_network
from mnist_dist.engine.optimizer import create_optimizer
from mnist_dist.engine.precision import LossScale, choose_precision
from mnist_dist.engine.programs.evaluate import EvaluateProgram
from mnist_dist.engine.programs.placement import PlacedSplit, place_split
from mnist_dist.engine.programs.replica_check import ReplicaCheck
from mnist_dist.engine.programs.state import TrainState
from mnist_dist.engine.programs.train import TrainProgram, XlaProgram
from mnist_dist.engine.reduction import ExactSum, FastSum
from mnist_dist.engine.runtime import configure_tensorflow, own_cores
from mnist_dist.engine.shards import ShardPlan, plan_shards
from mnist_dist.engine.trainer import Trainer
from mnist_dist.launch.rendezvous import Rendezvous
from mnist_dist.launch.topology import Topology
from mnist_dist.results.placement import Placement
from mnist_dist.results.predictions import Predictions, SplitPredictions, find_mistakes
from mnist_dist.results.sums import EpochSums, EvaluationSums, weights_digest
from mnist_dist.strategy.base import Strategy
from mnist_dist.strategy.choose import create_strategy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engine:
    """A training before its first epoch."""

    config: TrainConfig
    """With each `auto` resolved."""
    splits: Splits
    strategy: Strategy
    flat_model: FlatModel
    plan: BatchPlan
    shards: ShardPlan
    state: TrainState
    learning_rate: LearningRate
    augmentation: Augmentation | None
    topology: Topology

    @property
    def model(self) -> keras.Model:
        """The plain Keras model."""
        return self.flat_model.model

    @property
    def is_exact(self) -> bool:
        """Whether the number of replicas changes no bit."""
        return self.config.reproducibility == "exact"

    @property
    def compiled_by_xla(self) -> XlaProgram | None:
        """What XLA compiles as one program.

        An epoch, if XLA can. With `exact` a shard by itself, so that its bits do not depend on what is around it, as
        the number of shards that a replica has.
        """
        if self.config.compile != "xla":
            return None
        return "epoch" if self.strategy.has_xla_collectives and not self.is_exact else "shard"

    def weights(self) -> FloatArray:
        """The current weights, those that are trained."""
        return self.strategy.read(self.state.weights)

    def vectors(self) -> list[FloatArray]:
        """The model's current vectors (`FlatModel.vectors`)."""
        return [self.strategy.read(variable) for variable in self.state.model]

    def weights_digest(self) -> str:
        """The digest of the current weights."""
        return weights_digest(*self.vectors())

    def place_training_split(self, *, dtype: tf.DType = tf.float32) -> PlacedSplit:
        """The training images on the devices, with how they and their labels are changed."""
        split = place_split(self.splits.train, self.strategy, dtype=dtype)
        return split._replace(augmentation=self.augmentation, label_smoothing=self.config.loss.label_smoothing)

    def create_trainer(
        self, actions: Sequence[EpochAction] = (), *, wants_to_stop: Callable[[], bool] = lambda: False
    ) -> Trainer:
        """The trainer, with the data on the devices."""
        return Trainer(
            Programs(self, wants_to_stop=wants_to_stop),
            plan=self.plan,
            seed=self.config.seed,
            learning_rate_at=self.learning_rate.at,
            actions=actions,
        )

    def evaluate(self) -> tuple[dict[SplitName, EvaluationSums], Predictions]:
        """Evaluate the model as it will be saved, in float32, on every example of every split; a collective."""
        saved = FlatModel(self.flat_model.export(*self.vectors()), image_shape=self.splits.image_shape)
        sums, answers = {}, {}
        for name in SPLIT_NAMES:
            split = place_split(self.splits[name], self.strategy)
            program = EvaluateProgram(saved, strategy=self.strategy, split=split, wants_answers=True)
            sums[name], answers[name] = program.run_with_answers(self.state.model)
        labels = {name: self.splits[name].labels.argmax(axis=1) for name in SPLIT_NAMES}
        predictions = Predictions(
            self.splits.class_names,
            {
                name: SplitPredictions(sums[name].confusion, answers[name].predicted == labels[name])
                for name in SPLIT_NAMES
            },
            find_mistakes(
                answers["test"],
                labels=labels["test"],
                images=self.splits.test.images,
                image_shape=self.splits.image_shape,
            ),
        )
        return sums, predictions

    def placement(self) -> Placement:
        """Where and how the training runs."""
        num_replicas, global_batch_size = self.strategy.num_replicas, self.plan.global_batch_size
        return Placement(
            strategy=self.strategy.name,
            world_size=self.topology.world_size,
            num_replicas=num_replicas,
            global_batch_size=global_batch_size,
            per_replica_batch_size=-(-global_batch_size // num_replicas),
            precision=self.config.precision.name,
            reproducibility=self.config.reproducibility,
            num_shards=self.shards.num_shards,
        )

    def facts(self) -> dict[str, Any]:
        """On what the training runs, for `events.jsonl`."""
        return {**asdict(self.placement()), "devices": self.strategy.devices(), "versions": imported_versions()}

    def log_description(self) -> None:
        """Log what is trained on which devices, and how the examples are divided: nothing is scaled silently."""
        placement = self.placement()
        if (job := self.topology.slurm) is not None:
            log.info("Slurm: job %s on %s, restarted %d time(s)", job.job_id, job.node_list, job.restart_count)
        model = self.config.model
        name = model.factory if isinstance(model, KerasConfig) else model.name
        log.info("Model: %s, %s parameters", name, f"{self.flat_model.num_parameters:,}")
        if changes := self.config.augment.describe():
            log.info("Training images: each %s", changes)
        log.info(
            "Devices: %s; precision %s%s",
            ", ".join(self.strategy.devices()),
            placement.precision,
            f"; each {self.compiled_by_xla} is a program of XLA" if self.compiled_by_xla else "",
        )
        log.info(
            "Batch: %d over %d replica(s) in %d process(es), %d each; %d steps an epoch; learning rate %s",
            placement.global_batch_size,
            placement.num_replicas,
            placement.world_size,
            placement.per_replica_batch_size,
            self.plan.steps_per_epoch,
            self.learning_rate.describe(),
        )
        log.info(
            "Reproducibility: %s",
            f"exact, {placement.num_shards} shards: bit-identical on up to {placement.num_shards} replicas"
            if self.is_exact
            else "fast: the number of replicas may change the last bits",
        )
        num_shards, num_cores = -(-placement.num_shards // placement.world_size), own_cores(self.topology)
        if self.is_exact and not self.strategy.on_gpu and num_cores > num_shards:
            log.info(
                "Cores: %d of this process's %d compute at a time, one for each of its shards; a larger "
                "batch.num_shards uses more, with other bits",
                num_shards,
                num_cores,
            )

    def on(self, strategy: Strategy) -> "Engine":
        """The same training on another strategy, from the beginning."""
        return replace(self, strategy=strategy, state=_create_state(self.config, self.flat_model, strategy))


class Programs:
    """The compiled programs of a training, with the data on the devices; all of them are collectives."""

    def __init__(self, engine: Engine, *, wants_to_stop: Callable[[], bool] = lambda: False) -> None:
        strategy, dtype = engine.strategy, engine.flat_model.compute_dtype
        self._engine = engine
        self._train = TrainProgram(
            engine.flat_model,
            engine.state,
            split=engine.place_training_split(dtype=dtype),
            shards=engine.shards,
            reduction=ExactSum(strategy, engine.shards) if engine.is_exact else FastSum(strategy),
            xla=engine.compiled_by_xla,
        )
        self._validate = EvaluateProgram(
            engine.flat_model,
            strategy=strategy,
            split=place_split(engine.splits.val, strategy, dtype=dtype),
            xla=engine.compiled_by_xla == "epoch",
        )
        self._replica_check = ReplicaCheck(strategy=strategy, state=engine.state, wants_to_stop=wants_to_stop)

    def train_epoch(self, indices: npt.NDArray[np.int32], *, learning_rates: npt.NDArray[np.float64]) -> EpochSums:
        """Train on the steps of `indices`, each with its learning rate (see `TrainProgram.run_epoch`).

        Raises:
            UserError: TensorFlow has no kernel for what was asked for.
        """
        try:
            return self._train.run_epoch(indices, learning_rates=learning_rates)
        except (tf.errors.UnimplementedError, tf.errors.InvalidArgumentError) as error:
            if reason := _why_unimplemented(error, self._engine.config):
                raise UserError(reason) from error
            raise

    def trace_step(self) -> tf.types.experimental.ConcreteFunction:
        """One training step by itself, to be examined."""
        return self._train.trace_step()

    def validate(self) -> EvaluationSums:
        """Evaluate the current weights on the validation split."""
        return self._validate.run(self._engine.state.model)

    def agree_to_stop(self, epoch: int) -> bool:
        """Whether any process wants to stop after this epoch; raises TrainingFailed if replicas differ."""
        return self._replica_check.run(epoch)

    def digest_weights(self) -> str | None:
        """The digest of the current weights, if other runs can be compared by it: with exact."""
        return self._engine.weights_digest() if self._engine.is_exact else None


def _why_unimplemented(error: tf.errors.OpError, config: TrainConfig) -> str:
    """And what to choose instead; empty for other errors.

    Examples are max pooling, which XLA cannot compute deterministically on a GPU, and turning images, not at all.
    """
    lines = error.message.splitlines()
    reason = next((line for line in lines if "determinis" in line or "unsupported operations" in line), "")
    if not reason and isinstance(error, tf.errors.UnimplementedError):
        reason = lines[0]
    if not reason:
        return ""
    reason = shorten(re.sub(r"trying to compile graph \S+ on", "compiling for", reason).strip(), 300)
    keys = {
        "compile=none": config.compile == "xla",
        "reproducibility=fast": config.reproducibility == "exact" and "determinis" in reason,
    }
    advice = " or ".join(key for key, helps in keys.items() if helps) or "another model"
    return f"TensorFlow cannot compute this on these devices; choose {advice}: {reason}"


def build_engine(
    config: TrainConfig,
    rendezvous: Rendezvous,
    splits: Splits,
    *,
    num_gpus: int,
    saved_network: str | None = None,
    restored: Mapping[str, Array] | None = None,
) -> Engine:
    """Start the devices, of which `num_gpus` are GPUs, and build everything that the training needs.

    To resume a run, give which network it had (`network.describe_network`), and on the chief the `restored` state.

    Raises:
        UserError: strategy, devices and batch size do not match.
    """
    config, strategy = start_devices(config, rendezvous, num_gpus=num_gpus)
    return assemble(
        config, strategy, splits, topology=rendezvous.topology, saved_network=saved_network, restored=restored
    )


def start_devices(config: TrainConfig, rendezvous: Rendezvous, *, num_gpus: int) -> tuple[TrainConfig, Strategy]:
    """Configure TensorFlow and start the strategy, once per process; returns the configuration without any `auto`.

    Raises:
        UserError: strategy and devices do not match.
    """
    topology = rendezvous.topology
    mode = choose_mode(config, topology, num_gpus=num_gpus)
    configure_tensorflow(
        config.threads,
        topology,
        num_shards=-(-config.batch.num_shards // topology.world_size),
        exact=mode == "exact",
    )
    strategy = create_strategy(config.strategy, rendezvous, num_gpus=num_gpus)
    policy = choose_precision(config.precision.name, strategy.compute_capability())
    return replace(
        config,
        precision=replace(config.precision, name=policy),
        reproducibility=mode,
        compile=choose_compiler(config, mode=mode, on_gpu=strategy.on_gpu, is_single=strategy.has_xla_collectives),
    ), strategy


def assemble(
    config: TrainConfig,
    strategy: Strategy,
    splits: Splits,
    *,
    topology: Topology,
    saved_network: str | None = None,
    restored: Mapping[str, Array] | None = None,
) -> Engine:
    """Everything that the training of a configuration (as `start_devices` returns it) needs, on a started strategy.

    Raises:
        UserError: strategy and batch size, or augmentation and images, do not match, or the network cannot be trained
            (`build_network`).
    """
    batch_factor = strategy.num_replicas if config.batch.scaling == "weak" else 1
    global_batch_size = _global_batch_size(config, len(splits.train), batch_factor, strategy.num_replicas)
    flat_model = build_network(
        config, image_shape=splits.image_shape, num_classes=splits.num_classes, is_new=saved_network is None
    )
    if saved_network:
        check_same_network(config, flat_model, saved_network)
    shards = plan_shards(
        config,
        global_batch_size,
        num_replicas=strategy.num_replicas,
        on_gpu=strategy.on_gpu,
        by_shard=flat_model.is_by_shard,
        one_by_one=flat_model.penalizes_rows,
    )
    plan = BatchPlan(len(splits.train), global_batch_size, num_rows=shards.num_rows)
    return Engine(
        config=config,
        splits=splits,
        strategy=strategy,
        flat_model=flat_model,
        plan=plan,
        shards=shards,
        state=_create_state(config, flat_model, strategy, restored),
        learning_rate=LearningRate(
            config.learning_rate,
            base=config.optimizer.learning_rate,
            batch_factor=batch_factor,
            steps_per_epoch=plan.steps_per_epoch,
        ),
        augmentation=create_augmentation(config.augment, splits.image_shape, seed=config.seed),
        topology=topology,
    )


def _global_batch_size(config: TrainConfig, num_examples: int, batch_factor: int, num_replicas: int) -> int:
    size = min(config.batch.global_size * batch_factor, num_examples)
    if num_replicas > size:
        raise UserError(
            f"batch.global_size={config.batch.global_size}: fewer examples than the {num_replicas} replicas; "
            "ask for a larger batch or fewer replicas"
        )
    return size


def _create_state(
    config: TrainConfig,
    flat_model: FlatModel,
    strategy: Strategy,
    restored: Mapping[str, Array] | None = None,
) -> TrainState:
    return TrainState(
        flat_model.vectors(),
        optimizer=create_optimizer(config.optimizer, flat_model.weight_kinds()),
        loss_scale=LossScale(config.precision),
        strategy=strategy,
        clip_norm=config.gradient_clip_norm,
        restored=restored,
    )
