"""A replica that deviates by a single bit is named, and the run stops."""

import numpy as np
import pytest
from support.faulty_device import flip_bit_of_replica

from mnist_dist.base.errors import TrainingFailed
from mnist_dist.config.compose import compose_config
from mnist_dist.engine.optimizer import create_optimizer
from mnist_dist.engine.precision import LossScale
from mnist_dist.engine.programs.replica_check import ReplicaCheck
from mnist_dist.engine.programs.state import TrainState
from mnist_dist.strategy.mirrored import Mirrored

NUM_WEIGHTS = 1000


def make_check(num_replicas: int, *overrides: str) -> tuple[Mirrored, TrainState, ReplicaCheck]:
    strategy, config = Mirrored(num_replicas=num_replicas), compose_config(*overrides)
    weights = np.random.default_rng(0).normal(size=NUM_WEIGHTS).astype(np.float32)
    parts = {"optimizer": create_optimizer(config.optimizer), "loss_scale": LossScale(config.precision)}
    state = TrainState([weights, weights[:100] + 1], **parts, strategy=strategy)
    return strategy, state, ReplicaCheck(strategy=strategy, state=state)


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_a_request_to_stop_reaches_all(num_replicas):
    strategy, state, _ = make_check(num_replicas)
    requests = iter([False, True])
    check = ReplicaCheck(strategy=strategy, state=state, wants_to_stop=lambda: next(requests))
    assert [check.run(1), check.run(2)] == [False, True]


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 7])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_equal_replicas_pass(num_replicas, optimizer):
    _, _, check = make_check(num_replicas, f"optimizer={optimizer}")
    for epoch in (1, 2):
        check.run(epoch)


@pytest.mark.parametrize("vector", ["weights", "other weights", "first slot", "second slot"])
@pytest.mark.parametrize("element", [0, 71, -1])
def test_one_bit_of_one_replica(vector, element):
    strategy, state, check = make_check(3)
    names = ("weights", "other weights", "first slot", "second slot")
    variables = dict(zip(names, [*state.model, *state.slots], strict=True))
    element %= int(variables[vector].shape[0])
    flip_bit_of_replica(strategy, variables[vector], 1, element=element)
    with pytest.raises(TrainingFailed, match=r"^after epoch 4 replica 1 of 3 did not have the same weights"):
        check.run(4)
    flip_bit_of_replica(strategy, variables[vector], 1, element=element)
    check.run(5)  # back again


@pytest.mark.parametrize("replica", [0, 1, 2, 3])
def test_each_replica_is_found(replica):
    strategy, state, check = make_check(4)
    flip_bit_of_replica(strategy, state.weights, replica)
    with pytest.raises(TrainingFailed, match=f"replica {replica} of 4 did not"):
        check.run(1)


def test_several_replicas_are_named():
    strategy, state, check = make_check(5)
    flip_bit_of_replica(strategy, state.weights, 1, element=3)
    flip_bit_of_replica(strategy, state.weights, 4, element=5)
    with pytest.raises(TrainingFailed, match="replicas 1, 4 of 5 did not"):
        check.run(1)


@pytest.mark.parametrize("num_replicas", [2, 3])
def test_all_replicas_differ(num_replicas):
    strategy, state, check = make_check(num_replicas)
    for replica in range(1, num_replicas):
        flip_bit_of_replica(strategy, state.slots[1], replica, element=replica)
    with pytest.raises(TrainingFailed, match=rf"^after epoch 1 no two of the {num_replicas} replicas have"):
        check.run(1)
