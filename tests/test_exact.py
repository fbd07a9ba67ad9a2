"""Exact mode: the same bits on any strategy, number of devices and number of threads, with real MNIST and processes."""

from typing import NamedTuple

import numpy as np
import pytest
from conftest import Job
from jobs import job_name

SINGLE = ("single", 1)
JOBS = [
    ("mirrored", 2), ("mirrored", 3), ("mirrored", 4), ("multiworker", 2), ("horovod", 2), ("horovod", 3),
    ("horovod", 4),
]  # fmt: skip
FEW_JOBS = [("mirrored", 3), ("horovod", 2)]


class Bits(NamedTuple):
    """What of a run must not differ from another in a single bit."""

    weights: list[str]
    """A digest for every epoch."""
    losses: list[tuple[float, float]]
    num_correct: list[int]
    final_losses: list[float]


def bits(job: Job) -> Bits:
    rows, summary = job.history.epochs, job.summary
    assert summary["reproducibility"] == "exact"
    assert rows[-1].weights_sha256 == summary["weights_sha256"]
    return Bits(
        weights=[row.weights_sha256 for row in rows],
        losses=[(row.loss, row.val_loss) for row in rows],
        num_correct=[summary[split]["num_correct"] for split in ("train", "val", "test")],
        final_losses=[summary[split]["loss"] for split in ("train", "val", "test")],
    )


def copies(job: Job) -> set[tuple[str, ...]]:
    """Digests of weights and optimizer slots at the end, of every replica of every process."""
    return {
        replica for rank in job.ranks for replica in zip(rank["weights_sha256"], *rank["slots_sha256"], strict=True)
    }


@pytest.fixture(scope="module")
def recipe(mnist_path):
    """Dropout 0.4, Adam, batches of 512; 49,500 examples leave 348 for the last one."""
    return "data=mnist", f"data.path={mnist_path}", "trainer.epochs=3"


@pytest.fixture(scope="module")
def part_of_mnist(mnist_path, tmp_path_factory):
    """An eighth of it, for what is slow; 4,950 examples, 10 batches, the last one of 342."""
    path = tmp_path_factory.mktemp("part") / "mnist.npz"
    with np.load(mnist_path) as arrays:
        np.savez(path, **{name: array[: 6000 if "train" in name else 1000] for name, array in arrays.items()})
    return "data=npz", f"data.path={path}"


@pytest.mark.parametrize("job", JOBS, ids=job_name)
def test_the_recipe_gives_the_same_bits(job, train_with, recipe):
    single, other = train_with(*SINGLE, *recipe), train_with(*job, *recipe)
    assert bits(other) == bits(single)
    assert len(set(bits(single).weights)) == 3  # it does train


@pytest.mark.parametrize("job", JOBS, ids=job_name)
def test_every_replica_ends_with_the_same_weights_and_slots(job, train_with, recipe):
    single, other = train_with(*SINGLE, *recipe), train_with(*job, *recipe)
    assert sum(len(rank["weights_sha256"]) for rank in other.ranks) == job[1]
    ((weights, *slots),) = copies(single)
    assert weights == single.summary["weights_sha256"]
    assert len(set(slots)) == 2  # Adam's two, not alike
    assert copies(other) == copies(single)


@pytest.mark.parametrize("threads", [(1, "auto"), (2, 1), (2, 2)], ids=str)
def test_threads_change_the_speed_only(threads, train_with, recipe):
    intra_op, inter_op = threads
    settings = f"threads.intra_op={intra_op}", f"threads.inter_op={inter_op}", "trainer.epochs=1"
    first_epoch = train_with(*SINGLE, *recipe).history.epochs[0]
    (row,) = train_with(*SINGLE, *recipe, *settings).history.epochs
    assert row.weights_sha256 == first_epoch.weights_sha256
    assert (row.loss, row.val_loss) == (first_epoch.loss, first_epoch.val_loss)


@pytest.mark.parametrize("job", FEW_JOBS, ids=job_name)
def test_bfloat16(job, train_with, recipe):
    recipe = *recipe, "precision=mixed_bfloat16", "trainer.epochs=2"
    single, other = train_with(*SINGLE, *recipe), train_with(*job, *recipe)
    assert bits(other) == bits(single)
    assert copies(other) == copies(single)


@pytest.mark.parametrize("job", [("mirrored", 2), *FEW_JOBS], ids=job_name)
def test_convolutions(job, train_with, part_of_mnist):
    recipe = *part_of_mnist, "model=cnn", "trainer.epochs=2"
    single, other = train_with(*SINGLE, *recipe), train_with(*job, *recipe)
    assert bits(other) == bits(single)
    assert copies(other) == copies(single)


def test_another_number_of_shards_gives_other_bits(train_with, part_of_mnist):
    """So the equality above is no accident: what differs by rounding alone is seen."""
    recipe = *part_of_mnist, "trainer.epochs=1"
    digests = [
        train_with(*SINGLE, *recipe, f"batch.num_shards={num_shards}").summary["weights_sha256"]
        for num_shards in (8, 7)
    ]
    assert digests[0] != digests[1]
