"""The parts of a training run, put together: from configuration and data to a trainer that is ready to go."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import keras

from mnist_dist.base.console import job_log
from mnist_dist.base.errors import UserError
from mnist_dist.config.train import TrainConfig
from mnist_dist.data.splits import SPLIT_NAMES, SplitName, Splits
from mnist_dist.engine.batches import BatchPlan
from mnist_dist.engine.optimizer import LearningRate, Optimizer, create_optimizer
from mnist_dist.engine.precision import LossScale, choose_precision
from mnist_dist.engine.programs.train import EvaluateProgram, ReplicaCheck, TrainProgram, TrainState, place_split
from mnist_dist.engine.reduction import ExactSum, FastSum
from mnist_dist.engine.runtime import configure_tensorflow, own_cores
from mnist_dist.engine.shards import ShardPlan
from mnist_dist.engine.trainer import EpochAction, Trainer
from mnist_dist.launch.topology import Topology
from mnist_dist.models.build import FloatArray, Network, build_model
from mnist_dist.results.sums import EvaluationSums, weights_digest
from mnist_dist.strategy.base import Array
from mnist_dist.strategy.choose import Strategy, create_strategy

_FAST_ROWS = 128
"""Rows of a part of a replica's batch on a CPU, with reproducibility=fast: parts keep the cores busy side by side."""


@dataclass(frozen=True)
class Training:
    """A training run before its first epoch."""

    config: TrainConfig
    """With what each `auto` has become."""
    splits: Splits
    strategy: Strategy
    model: keras.Model
    network: Network
    plan: BatchPlan
    shards: ShardPlan
    optimizer: Optimizer
    loss_scale: LossScale
    state: TrainState
    learning_rate: LearningRate
    num_cores: int
    """Of this process."""

    def create_trainer(
        self, actions: Sequence[EpochAction] = (), *, wants_to_stop: Callable[[], bool] = lambda: False
    ) -> Trainer:
        """The trainer, with its data on the devices."""
        dtype, config = self.network.compute_dtype, self.config
        is_exact = config.reproducibility == "exact"
        train_program = TrainProgram(
            network=self.network,
            optimizer=self.optimizer,
            loss_scale=self.loss_scale,
            strategy=self.strategy,
            state=self.state,
            split=place_split(self.splits.train, self.strategy, dtype=dtype),
            shards=self.shards,
            reduction=ExactSum(self.strategy, self.shards) if is_exact else FastSum(self.strategy),
        )
        validation = EvaluateProgram(
            network=self.network,
            strategy=self.strategy,
            split=place_split(self.splits.val, self.strategy, dtype=dtype),
        )
        replica_check = ReplicaCheck(strategy=self.strategy, state=self.state, wants_to_stop=wants_to_stop)
        return Trainer(
            train_epoch=train_program.run_epoch,
            validate=lambda: validation.run(self.state.weights),
            plan=self.plan,
            seed=config.seed,
            learning_rate_at=self.learning_rate.at,
            check_replicas=replica_check.run,
            digest_weights=lambda: weights_digest(self.weights()) if is_exact else None,
            actions=actions,
        )

    def weights(self) -> FloatArray:
        """The weights as they are now."""
        return self.strategy.read(self.state.weights)

    def evaluate(self) -> dict[SplitName, EvaluationSums]:
        """Evaluate the model that is saved, which is float32, on every example of every split; a collective."""
        saved = Network(self.network.export(self.weights()))
        return {
            name: EvaluateProgram(
                network=saved, strategy=self.strategy, split=place_split(self.splits[name], self.strategy)
            ).run(self.state.weights)
            for name in SPLIT_NAMES
        }


def build_training(
    config: TrainConfig,
    topology: Topology,
    splits: Splits,
    *,
    num_gpus: int,
    restored: Mapping[str, Array] | None = None,
) -> Training:
    """Start the devices, of which `num_gpus` are GPUs, and build everything that the training needs.

    The state is a new one, or the chief's `restored` one on all processes.

    Raises:
        UserError: strategy, devices and batch do not fit together.
    """
    mode = choose_mode(config, topology, num_gpus=num_gpus)
    configure_tensorflow(
        config.threads,
        topology,
        num_shards=-(-config.batch.num_shards // topology.world_size),
        exact=mode == "exact",
    )
    strategy = create_strategy(config.strategy, topology, num_gpus=num_gpus)
    policy = choose_precision(config.precision.name, strategy.compute_capability())
    batch_factor = strategy.num_replicas if config.batch.scaling == "weak" else 1
    plan = BatchPlan(len(splits.train), min(config.batch.global_size * batch_factor, len(splits.train)))
    if strategy.num_replicas > plan.global_batch_size:
        raise UserError(
            f"batch.global_size={config.batch.global_size}: fewer examples than the {strategy.num_replicas} replicas; "
            "ask for a larger batch or fewer replicas"
        )
    config = replace(config, precision=replace(config.precision, name=policy), reproducibility=mode)
    shards = plan_shards(config, plan.global_batch_size, num_replicas=strategy.num_replicas, on_gpu=num_gpus > 0)
    model = build_model(config.model, image_shape=splits.image_shape, num_classes=splits.num_classes, seed=config.seed)
    network = Network(model, seed=config.seed, policy=policy)
    optimizer, loss_scale = create_optimizer(config.optimizer), LossScale(config.precision)
    return Training(
        config=config,
        splits=splits,
        strategy=strategy,
        model=model,
        network=network,
        plan=plan,
        shards=shards,
        optimizer=optimizer,
        loss_scale=loss_scale,
        state=TrainState(
            network.get_weights(), optimizer=optimizer, loss_scale=loss_scale, strategy=strategy, restored=restored
        ),
        learning_rate=LearningRate(
            config.learning_rate,
            base=config.optimizer.learning_rate,
            batch_factor=batch_factor,
            steps_per_epoch=plan.steps_per_epoch,
        ),
        num_cores=own_cores(topology),
    )


def choose_mode(config: TrainConfig, topology: Topology, *, num_gpus: int) -> str:
    """Exact or fast, before the devices start; a warning says what is configured and will have no effect.

    `auto` is exact on CPUs, where it costs little, and fast on GPUs, where one large product beats several small ones.
    """
    mode, num_shards = config.reproducibility, config.batch.num_shards
    if mode == "auto":
        # On CPUs a process has one replica, or those that are asked for.
        num_replicas = max(topology.world_size, config.strategy.num_replicas or 1)
        mode = "fast" if num_gpus or num_replicas > num_shards else "exact"
        if mode == "fast" and not num_gpus:
            job_log.warning(
                "WARNING: batch.num_shards=%d: fewer shards than the %d replicas, so reproducibility=auto is fast and "
                "the number of replicas may change the last bits; batch.num_shards=%d makes it exact",
                num_shards,
                num_replicas,
                num_replicas,
            )
    if mode == "exact" and config.threads.intra_op != "auto" and int(config.threads.intra_op) != 1:
        job_log.warning(
            "WARNING: threads.intra_op=%s is not used: reproducibility=exact runs each operation on one thread, so "
            "that the bits do not depend on the number; a larger batch.num_shards, more processes or "
            "reproducibility=fast use more cores",
            config.threads.intra_op,
        )
    return mode


def plan_shards(config: TrainConfig, global_batch_size: int, *, num_replicas: int, on_gpu: bool) -> ShardPlan:
    """How a global batch is cut, in a mode that is settled.

    Raises:
        UserError: exact with more replicas than shards.
    """
    num_shards = config.batch.num_shards
    if config.reproducibility == "fast":
        parts = 1 if on_gpu else max(1, global_batch_size // num_replicas // _FAST_ROWS)
        num_shards = num_replicas * parts
    elif num_replicas > num_shards:
        raise UserError(
            f"batch.num_shards={num_shards}: fewer shards than the {num_replicas} replicas, and each replica computes "
            f"whole shards; say batch.num_shards={num_replicas} (other bits than with {num_shards}), "
            "or reproducibility=fast"
        )
    return ShardPlan(num_shards, rows_per_shard=-(-global_batch_size // num_shards), num_replicas=num_replicas)
