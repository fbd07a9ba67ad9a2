"""Runs `mnist_dist.verify` as usual, but with a fault in the cluster: `FAULT=NAME` or `FAULT=NAME:REPLICA`.

The faults are put where a real one would be: into the backend's sum, the data in memory, the network, a file.
"""

import dataclasses
import os
import signal
import sys
import time

import numpy as np

from mnist_dist.launch.environment import read_topology
from mnist_dist.verify import __main__ as verify
from mnist_dist.verify.context import Context

NAME, _, WHERE = os.environ["FAULT"].partition(":")
REPLICA = int(WHERE or -1)
SLEEP_S = 0.03


def is_here(context) -> bool:
    """Whether the faulty replica is one of this process's."""
    num_local = len(context.strategy.devices())
    return context.topology.rank == REPLICA // num_local


def corrupted_all_reduce(context):
    """One replica's contribution to each sum is wrong in one number."""
    import tensorflow as tf

    backend = type(context.strategy)
    reduce = backend.all_reduce_sum

    def corrupt(self, bucket):
        if self.replica_index() == REPLICA and bucket.shape.rank == 1:
            bucket = tf.concat([2 * bucket[:1], bucket[1:]], axis=0)
        return reduce(self, bucket)

    backend.all_reduce_sum = corrupt


def corrupted_all_gather(context):
    """What one replica sends to all is wrong in one number."""
    import tensorflow as tf

    backend = type(context.strategy)
    gather = backend.all_gather

    def corrupt(self, rows):
        if self.replica_index() == REPLICA and rows.shape.rank == 1:
            rows = tf.concat([rows[:-1], 2 * rows[-1:]], axis=0)
        return gather(self, rows)

    backend.all_gather = corrupt


def shuffled_labels(context):
    strategy, splits = context._started
    if is_here(context):
        labels = np.random.default_rng(0).permutation(splits.train.labels)
        splits = dataclasses.replace(splits, train=dataclasses.replace(splits.train, labels=labels))
        context._started = strategy, splits


def shard_read_twice(context):
    """One replica computes another one's shards."""
    from mnist_dist.engine.shards import ShardPlan

    shards_of = ShardPlan.shards_of
    other = (REPLICA + 1) % context.strategy.num_replicas

    def confuse(self, replica):
        return shards_of(self, other if replica == REPLICA and self.num_replicas > 1 else replica)

    ShardPlan.shards_of = confuse


def on_engines(change):
    """Let `change` have each training that is assembled."""
    from mnist_dist.engine import build

    assemble = build.assemble

    def assemble_and_change(*args, **options):
        engine = assemble(*args, **options)
        return change(engine) or engine

    build.assemble = assemble_and_change


def scaled_rate(context):
    """The learning rate grows with the number of replicas, which nobody has asked for."""

    class Scaled:
        def __init__(self, rate, factor):
            self._rate, self._factor = rate, factor

        def at(self, steps):
            return self._factor * self._rate.at(steps)

    on_engines(
        lambda engine: dataclasses.replace(
            engine, learning_rate=Scaled(engine.learning_rate, engine.strategy.num_replicas)
        )
    )


def doubled_rate(where):
    """The learning rate is twice as large, on all replicas and on one alone, in trainings of which `where` holds."""

    class Doubled:
        def __init__(self, rate):
            self._rate = rate

        def at(self, steps):
            return 2 * self._rate.at(steps)

    def change(engine):
        if where(engine.config):
            return dataclasses.replace(engine, learning_rate=Doubled(engine.learning_rate))
        return None

    on_engines(change)


def scaled_rate_in_mixed_precision(context):
    """The learning rate is twice as large, but only in mixed precision."""
    doubled_rate(lambda config: config.precision.name != "float32")


def scaled_rate_in_fast_mode(context):
    """The learning rate is twice as large, but only in fast mode."""
    doubled_rate(lambda config: config.reproducibility == "fast")


def divided_twice_in_fast_mode(context):
    """Only the sums of fast mode are divided by the number of replicas."""
    from mnist_dist.engine import build

    exact = build.ExactSum
    divided_twice(context)
    build.ExactSum = exact


def stale_weights(context):
    """One replica does not start with rank 0's weights."""
    from support.faulty_device import flip_bit_of_replica

    def change(engine):
        if engine.strategy.num_replicas > 1:
            flip_bit_of_replica(engine.strategy, engine.state.weights, REPLICA)

    on_engines(change)


def in_the_network(context, change):
    """Let `change` have the logits of each shard that the faulty replica computes while training."""
    device = context.strategy.devices()[REPLICA % len(context.strategy.devices())] if is_here(context) else None

    def patch(engine):
        flat_model, strategy = engine.flat_model, engine.strategy
        compute = flat_model.training_pass

        def faulty(weights, images, rows):
            found = compute(weights, images, rows)
            is_faulty = strategy.num_replicas == 1 and strategy.devices() == [device]
            is_faulty |= strategy.num_replicas > 1 and is_here(context) and strategy.replica_index() == REPLICA
            return found._replace(logits=change(found.logits)) if is_faulty else found

        flat_model.training_pass = faulty

    on_engines(patch)


def slow_rank(context):
    """A step takes 30 ms more."""
    import tensorflow as tf

    def sleep():
        time.sleep(SLEEP_S / context.config.batch.num_shards)
        return np.float32(0)

    in_the_network(context, lambda logits: logits + tf.numpy_function(sleep, [], tf.float32))


def flaky_core(context):
    """One product in 17 is wrong."""
    import tensorflow as tf

    calls = [0]

    def error():
        calls[0] += 1
        return np.float32(0.5 if calls[0] % 17 == 0 else 0)

    in_the_network(context, lambda logits: logits * (1 + tf.numpy_function(error, [], tf.float32)))


def broken_core(context):
    """Every product is wrong, in the same way."""
    in_the_network(context, lambda logits: logits * 1.05)


def flipped_bit_in_checkpoint(context):
    """The file system returns other bytes than were written."""
    replace = os.replace

    def replace_and_flip(source, target, **options):
        replace(source, target, **options)
        if str(target).endswith(".ckpt"):
            descriptor = os.open(target, os.O_RDWR, dir_fd=options.get("dst_dir_fd"))
            byte = os.pread(descriptor, 1, 100_000)
            os.pwrite(descriptor, bytes([byte[0] ^ 4]), 100_000)
            os.close(descriptor)

    os.replace = replace_and_flip


def wrong_dropout(context):
    """All replicas drop other shares of the units than configured."""
    from mnist_dist.engine.layers.dropout import PositionalDropout

    create = PositionalDropout.__init__
    PositionalDropout.__init__ = lambda self, rate, **options: create(self, rate / 2, **options)


def divided_twice(context):
    """The gradient is divided by the number of replicas, although it is a sum over the whole batch."""
    import tensorflow as tf

    from mnist_dist.engine import build

    def dividing(create):
        def create_and_divide(strategy, *args):
            reduction = create(strategy, *args)

            def reduce(sums):
                bucket = reduction(sums)
                return tf.concat([bucket[:-2] / strategy.num_replicas, bucket[-2:]], axis=0)

            return reduce

        return create_and_divide

    build.ExactSum, build.FastSum = dividing(build.ExactSum), dividing(build.FastSum)


def steps_alone(context):
    """One replica makes a step after an overflow that all others skip."""
    from mnist_dist.engine.programs.state import TrainState

    update = TrainState.update

    def update_anyway(self, gradient, *args):
        import tensorflow as tf

        if self._loss_scale.is_dynamic and self.strategy.replica_index() == REPLICA:
            gradient = tf.where(tf.math.is_finite(gradient), gradient, tf.zeros_like(gradient))
        update(self, gradient, *args)

    TrainState.update = update_anyway


def blind_judge(context):
    """A check that finds nothing, whatever the evidence."""
    from mnist_dist.verify.checks.base import Finding
    from mnist_dist.verify.checks.cross_examination import CrossExamination

    CrossExamination.judge = lambda self, evidence: Finding("pass", "all is well")


def in_the_middle(action, *, of="25 steps of adam"):
    """Do something on one rank in a phase of a check: in "exact", between its two optimizers."""

    def fault(context):
        enter = context.enter

        def enter_and_act(phase):
            enter(phase)
            if phase.startswith(of) and is_here(context):
                action()

        context.enter = enter_and_act

    return fault


hang = in_the_middle(lambda: time.sleep(3600))
hang_after_barriers = in_the_middle(lambda: time.sleep(3600), of="block 2")
freeze = in_the_middle(lambda: os.kill(os.getpid(), signal.SIGSTOP))


def raise_error():
    raise RuntimeError("the device has fallen off the bus")


raises = in_the_middle(raise_error)
raises_alone = in_the_middle(raise_error, of="compiling")
raises_between_barriers = in_the_middle(raise_error, of="block 2")
killed = in_the_middle(lambda: os.kill(os.getpid(), signal.SIGKILL))


def other_code(context):
    """Not reached: see below."""


start = Context.start


def start_with_fault(self, console):
    start(self, console)
    globals()[NAME](self)


Context.start = start_with_fault
if NAME == "other_code" and read_topology().rank == REPLICA:
    from mnist_dist.verify.checks import identity

    identity.code_digest = lambda: "0" * 64
if __name__ == "__main__":
    sys.exit(verify.main())
