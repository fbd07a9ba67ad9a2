"""Exact mode: the same bits on any strategy, number of devices and number of threads, with real MNIST and processes."""

import json
from typing import NamedTuple

import numpy as np
import pytest
from support.hooks import HOOKS
from support.job import SINGLE, TRAIN, job_name
from support.sums import tree_sum, wild

from mnist_dist.results.history import from_csv

# One process has all of them, as they share what takes long to make.
pytestmark = pytest.mark.xdist_group("trained")

JOBS = [("mirrored", 2), ("multiworker", 2), ("horovod", 2)]
LARGER_JOBS = [("mirrored", 3), ("mirrored", 4), ("horovod", 3), ("horovod", 4), ("horovod", 5)]
FEW_JOBS = [("mirrored", 3), ("horovod", 2)]


class Bits(NamedTuple):
    """What must be the same, bit for bit, in two runs."""

    weights: list[str]
    """A digest for every epoch."""
    losses: list[tuple[float, float]]
    num_correct: list[int]
    final_losses: list[float]


def bits(job) -> Bits:
    rows, summary = job.history.epochs, job.summary
    assert summary["reproducibility"] == "exact"
    assert rows[-1].weights_sha256 == summary["weights_sha256"]
    return Bits(
        weights=[row.weights_sha256 for row in rows],
        losses=[(row.loss, row.val_loss) for row in rows],
        num_correct=[summary[split]["num_correct"] for split in ("train", "val", "test")],
        final_losses=[summary[split]["loss"] for split in ("train", "val", "test")],
    )


def copies(job) -> set[tuple[str, ...]]:
    """Digests of the final weights and optimizer slots, for every replica of every process."""
    return {
        replica for rank in job.ranks for replica in zip(rank["weights_sha256"], *rank["slots_sha256"], strict=True)
    }


@pytest.fixture(scope="module")
def recipe(mnist_path):
    """Dropout 0.4, Adam, batches of 512; with 49,500 examples the last one has 348."""
    return "data=mnist", f"data.path={mnist_path}", "trainer.epochs=2"


@pytest.mark.parametrize("job", JOBS, ids=job_name)
def test_the_recipe_gives_the_same_bits(job, train_with, recipe):
    single, other = train_with(*SINGLE, *recipe), train_with(*job, *recipe)
    assert bits(other) == bits(single)
    assert len(set(bits(single).weights)) == 2  # it did train


@pytest.mark.parametrize("job", LARGER_JOBS, ids=job_name)
def test_a_part_of_mnist_gives_the_same_bits(job, train_with, part_of_mnist):
    """The same steps, only fewer: batches of 512 and a short one at the end."""
    recipe = *part_of_mnist, "trainer.epochs=3"
    single, other = train_with(*SINGLE, *recipe), train_with(*job, *recipe)
    assert bits(other) == bits(single)
    assert len(set(bits(single).weights)) == 3


@pytest.mark.parametrize("job", [*JOBS, *LARGER_JOBS], ids=job_name)
def test_every_replica_ends_with_the_same_weights_and_slots(job, train_with, recipe, part_of_mnist):
    recipe = recipe if job in JOBS else (*part_of_mnist, "trainer.epochs=3")
    single, other = train_with(*SINGLE, *recipe), train_with(*job, *recipe)
    assert sum(len(rank["weights_sha256"]) for rank in other.ranks) == job[1]
    ((weights, *slots),) = copies(single)
    assert weights == single.summary["weights_sha256"]
    assert len(set(slots)) == 2  # Adam's two, which differ
    assert copies(other) == copies(single)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_way_to_reduce_gives_the_bits_of_one_replica(size, run_job, tmp_path):
    """Gathered or scattered, by real Horovod; the ranks add the numbers, and then twice as much."""
    for result in run_job(("horovod", size), script=[HOOKS / "reduce_exactly.py", tmp_path], launcher="srun"):
        assert result.returncode == 0, result.stderr + result.stdout
    expected = {shards: tree_sum(wild(shards, num_values)) for shards, num_values in ((8, 300_001), (11, 1001))}
    for rank in range(size):
        with np.load(tmp_path / f"rank-{rank}.npz") as found:
            assert set(found) == {f"{shards} {way}" for shards in expected for way in ("gather", "scatter", None)}
            for name, sums in found.items():
                alone = expected[int(name.split()[0])]
                assert sums.tobytes() == np.stack([alone, 2 * alone]).tobytes(), (rank, name)


@pytest.fixture(scope="module")
def bits_of_shapes(run_python):
    """What `bits_of_shapes.py` prints on a machine that seems to have that many cores."""

    def run(num_cores, *args, env=None) -> dict[str, str]:
        result = run_python(HOOKS / "bits_of_shapes.py", *args, env={"NUM_CORES": num_cores, **(env or {})}, fresh=True)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def bits_of_shapes_on_one_thread(bits_of_shapes):
    return bits_of_shapes("1", "threads.intra_op=1")


def test_threads_and_cores_change_only_the_speed(bits_of_shapes, bits_of_shapes_on_one_thread):
    variables = {"OMP_NUM_THREADS": "3", "TF_NUM_INTRAOP_THREADS": "5", "TF_NUM_INTEROP_THREADS": "3"}
    found = bits_of_shapes("64", "threads.intra_op=7", env=variables)
    assert found == bits_of_shapes_on_one_thread
    assert len(set(found.values())) == len(found) >= 10


def test_other_threads_after_a_stop(train_with, part_of_mnist, run_python, tmp_path):
    """512 rows per shard, where 1 and 8 threads inside an operation would differ."""
    recipe = *part_of_mnist, "batch.global_size=4096", "strategy=single"
    whole = train_with(*SINGLE, *recipe, "trainer.epochs=2", "threads.intra_op=1")
    for epochs, threads in ((1, "8"), (2, "64")):
        more = f"trainer.epochs={epochs}", f"threads.intra_op={threads}", f"run_dir={tmp_path / 'run'}"
        result = run_python(*TRAIN, *recipe, *more)
        assert result.returncode == 0, result.stderr
        assert f"WARNING: threads.intra_op={threads} is ignored" in result.stdout
    assert "Resuming after epoch 1 of 2" in result.stdout
    rows = from_csv((tmp_path / "run" / "history.csv").read_text()).epochs
    assert [row.weights_sha256 for row in rows] == bits(whole).weights


@pytest.mark.parametrize("job", FEW_JOBS, ids=job_name)
def test_bfloat16(job, train_with, part_of_mnist):
    recipe = *part_of_mnist, "precision=mixed_bfloat16", "trainer.epochs=2"
    single, other = train_with(*SINGLE, *recipe), train_with(*job, *recipe)
    assert bits(other) == bits(single)
    assert copies(other) == copies(single)


@pytest.mark.parametrize("job", [("mirrored", 2), *FEW_JOBS], ids=job_name)
def test_convolutions(job, train_with, part_of_mnist):
    recipe = *part_of_mnist, "model=cnn", "trainer.epochs=1"
    single, other = train_with(*SINGLE, *recipe), train_with(*job, *recipe)
    assert bits(other) == bits(single)
    assert copies(other) == copies(single)


@pytest.mark.parametrize("augment", ["shift", "affine"])
@pytest.mark.parametrize("job", [("mirrored", 2), *FEW_JOBS], ids=job_name)
def test_changed_images(job, augment, train_with, part_of_mnist):
    recipe = *part_of_mnist, f"augment={augment}", "trainer.epochs=1"
    single, other = train_with(*SINGLE, *recipe), train_with(*job, *recipe)
    assert bits(other) == bits(single)
    assert copies(other) == copies(single)
    assert bits(single).weights != bits(train_with(*SINGLE, *part_of_mnist, "trainer.epochs=1")).weights


def test_another_number_of_shards_gives_other_bits(train_with, part_of_mnist):
    """So the equality above is no accident: even a difference in rounding is noticed."""
    recipe = *part_of_mnist, "trainer.epochs=1"
    digests = [
        train_with(*SINGLE, *recipe, f"batch.num_shards={num_shards}").summary["weights_sha256"]
        for num_shards in (8, 7)
    ]
    assert digests[0] != digests[1]
