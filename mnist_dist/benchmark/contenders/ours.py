"""Our own epoch, and its parts.

For a job of several processes: the computing alone and the all-reduces alone; for one process: a step's operations.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

# TensorFlow's own module for the files of its profiler, generated from xplane.proto; there is no public name for it.
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from mnist_dist.base.array import Array
from mnist_dist.benchmark.contenders.keras_fit import describe_tensorflow
from mnist_dist.benchmark.operations import examine
from mnist_dist.benchmark.profile import summarize
from mnist_dist.benchmark.protocol import Turns
from mnist_dist.config.train import TrainConfig
from mnist_dist.data.splits import Splits
from mnist_dist.engine.build import Engine, Programs, build_engine
from mnist_dist.engine.shards import plan_shards
from mnist_dist.engine.trainer import Programs as AnyPrograms
from mnist_dist.engine.trainer import Trainer
from mnist_dist.launch.rendezvous import Rendezvous
from mnist_dist.strategy.base import SingleDevice, Strategy
from mnist_dist.strategy.choose import list_gpus

MESSAGE_BYTES = tuple(1024 * 2**n for n in range(14))
"""1 KiB to 8 MiB."""
_MESSAGE_LOOPS, _MESSAGES_A_LOOP = 9, 10


def take_part(turns: Turns, splits: Splits, *, config: TrainConfig, rendezvous: Rendezvous) -> None:
    """Train, or measure the part that is asked for, until the benchmark has enough."""
    topology = rendezvous.topology
    engine = build_engine(config, rendezvous, splits, num_gpus=len(list_gpus()))
    trainer = engine.create_trainer()
    parts: dict[str, Callable[[], dict[str, Any]]] = {"epoch": _epochs(trainer)}
    if topology.world_size > 1:
        if len(engine.strategy.devices()) == 1:
            parts["compute"] = _share_of_epochs(engine, index=topology.rank)
        parts["all_reduces"] = _all_reduces(engine)
        parts["message_sizes"] = lambda: _measure_messages(engine.strategy)
    elif not engine.strategy.on_gpu:  # a GPU's operations are not computed by threads
        parts["profile"] = lambda: _profile(engine, trainer.programs)
    facts = {
        **describe_tensorflow(),
        "precision": engine.config.precision.name,
        "reproducibility": engine.config.reproducibility,
        "strategy": engine.strategy.name,
        "num_replicas": engine.strategy.num_replicas,
        "world_size": topology.world_size,
        # Those of several replicas include collectives, whose kernels depend on how TensorFlow and Horovod were built.
        **({"gpu_operations": _count_operations(engine)} if engine.strategy.num_replicas == 1 else {}),
    }
    turns.ready(facts, parts=list(parts))
    while True:
        turns.done(**parts[turns.wait()]())


def _count_operations(engine: Engine) -> dict[str, int]:
    """How many operations a GPU would run for a step, and how many would be left to the host."""
    size = engine.plan.global_batch_size
    shards = plan_shards(engine.config, size, num_replicas=1, on_gpu=True)
    found = examine(Programs(replace(engine, shards=shards)).trace_step())
    return {"device": found.device.total(), "host": len(found.host)}


def _epochs(trainer: Trainer) -> Callable[[], dict[str, Any]]:
    """Each call trains the next epoch."""
    epoch = 0

    def run() -> dict[str, Any]:
        nonlocal epoch
        epoch += 1
        start = time.perf_counter()
        metrics = trainer.run_epoch(epoch)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "loss": metrics.loss, "val_accuracy": metrics.val_accuracy}

    return run


class OneShare(SingleDevice):
    """One replica of a job that does its share of the work without communicating.

    What it trains is useless, since it sees only a part of each gradient; its time is what counts.
    """

    name = "share"

    def __init__(self, strategy: Strategy, *, index: int) -> None:
        self._device = strategy.devices()[0]
        self.num_replicas = strategy.num_replicas
        self.has_all_to_all = strategy.has_all_to_all
        self._index = index

    def create_variable(self, value: Array) -> tf.Variable:
        """A plain variable."""
        with tf.device(self._device):
            return tf.Variable(value)

    def replica_index(self) -> int:
        """The replica whose share it is."""
        return self._index

    def all_gather(self, rows: tf.Tensor) -> tf.Tensor:
        """Its own rows in place of every replica's."""
        return tf.concat([rows] * self.num_replicas, axis=0)

    def all_to_all(self, rows: tf.Tensor) -> tf.Tensor:
        """Its own slices in place of those of every replica."""
        return rows


def _share_of_epochs(engine: Engine, *, index: int) -> Callable[[], dict[str, Any]]:
    """Each call computes one replica's share of the next epoch, without any collective."""
    programs = Programs(engine.on(OneShare(engine.strategy, index=index)))
    epoch = 0

    def run() -> dict[str, Any]:
        nonlocal epoch
        epoch += 1
        start = time.perf_counter()
        _train(engine, programs, epoch=epoch)
        programs.validate()
        return {"seconds": time.perf_counter() - start}

    return run


def _train(engine: Engine, programs: AnyPrograms, *, epoch: int) -> float:
    """Train one epoch without its validation; returns the seconds it took."""
    start = time.perf_counter()
    indices = engine.plan.shuffled(seed=engine.config.seed, epoch=epoch)
    steps = np.arange(len(indices)) + (epoch - 1) * len(indices)
    programs.train_epoch(indices, learning_rates=engine.learning_rate.at(steps))
    return time.perf_counter() - start


def _profile(engine: Engine, programs: AnyPrograms) -> dict[str, Any]:
    """Train an epoch twice, the second time with TensorFlow's profiler; see `profile.summarize`."""
    untraced_s = _train(engine, programs, epoch=1)
    with tempfile.TemporaryDirectory(prefix="mnist_dist_benchmark_") as folder:
        # No options: TensorFlow 2.21 ignores them ("host_tracer_level expects an i value" in its log).
        with tf.profiler.experimental.Profile(folder):
            seconds = _train(engine, programs, epoch=1)
        (file,) = Path(folder).rglob("*.xplane.pb")
        traced = xplane_pb2.XSpace.FromString(file.read_bytes())
    threads = [
        [(event.offset_ps, event.duration_ps, plane.event_metadata[event.metadata_id].name) for event in line.events]
        for plane in traced.planes
        if plane.name == "/host:CPU"
        for line in plane.lines
    ]
    num_steps = engine.plan.steps_per_epoch
    summary = summarize(threads, num_steps=num_steps, seconds=seconds)
    return {"seconds": seconds, "profile": {**summary, "untraced_step_ms": 1e3 * untraced_s / num_steps}}


def _all_reduces(engine: Engine) -> Callable[[], dict[str, Any]]:
    """Each call reduces as many buckets of gradients and metric sums as an epoch has steps."""
    loop = _create_reduce_loop(engine.strategy, size=engine.flat_model.num_sums)
    num_steps = tf.constant(engine.plan.steps_per_epoch)

    def run() -> dict[str, Any]:
        start = time.perf_counter()
        loop(num_steps).numpy()
        return {"seconds": time.perf_counter() - start}

    return run


def _create_reduce_loop(strategy: Strategy, *, size: int) -> Callable[[tf.Tensor], tf.Tensor]:
    """A compiled loop of all-reduces of `size` float32 numbers; called with how many."""
    bucket = strategy.create_variable(np.ones(size, np.float32))

    def reduce_once() -> tf.Tensor:
        mean = strategy.all_reduce_sum(bucket.read_value()) / strategy.num_replicas
        # Each one needs the result of the one before, or TensorFlow would start several at once.
        bucket.assign(mean)
        return mean[0]

    def reduce_often(number: tf.Tensor) -> tf.Tensor:
        last = tf.constant(0.0)
        for _ in tf.range(number):
            last = strategy.run(reduce_once)
        return last

    compiled: Callable[[tf.Tensor], tf.Tensor] = tf.function(reduce_often)
    return compiled


def _measure_messages(strategy: Strategy) -> dict[str, Any]:
    """Seconds of one all-reduce, by size: medians over loops."""
    rows = []
    number = tf.constant(_MESSAGES_A_LOOP)
    for num_bytes in MESSAGE_BYTES:
        loop = _create_reduce_loop(strategy, size=num_bytes // 4)
        times = []
        for _ in range(1 + _MESSAGE_LOOPS):  # the first call compiles
            start = time.perf_counter()
            loop(number).numpy()
            times.append((time.perf_counter() - start) / _MESSAGES_A_LOOP)
        rows.append({"bytes": num_bytes, "seconds": statistics.median(times[1:])})
    return {"seconds": 0.0, "all_reduce": rows, "num_replicas": strategy.num_replicas, "strategy": strategy.name}
