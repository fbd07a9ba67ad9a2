"""The same training with all strategies and sizes, real processes and real collectives; up to rounding (`fast`).

`test_exact.py` tests that `exact` gives the same bits.
"""

import json

import keras
import numpy as np
import pytest
from support.job import job_name

from mnist_dist.config.compose import compose_config
from mnist_dist.data.load import load_dataset
from mnist_dist.data.splits import preprocess
from mnist_dist.results.history import from_csv

# One process has all of them, as they share what takes long to make.
pytestmark = pytest.mark.xdist_group("trained")

# (strategy, processes or replicas)
SMALL_JOBS = [
    ("mirrored", 2),
    ("mirrored", 3),
    ("mirrored", 4),
    ("multiworker", 2),
    ("horovod", 2),
    ("horovod", 3),
    ("horovod", 4),
]
MNIST_JOBS = [("multiworker", 2), ("horovod", 3)]


@pytest.fixture(scope="module")
def three_sgd_steps(small_npz):
    """A learning rate of 1 and no dropout expose a gradient that is off by any factor. The last batch is short."""
    return (
        "data=npz", f"data.path={small_npz}", "optimizer=sgd", "optimizer.learning_rate=1", "model.dropout=0",
        "trainer.epochs=1", "batch.global_size=200", "reproducibility=fast",
    )  # fmt: skip


@pytest.fixture(scope="module")
def one_epoch_of_mnist(mnist_path):
    return "data=mnist", f"data.path={mnist_path}", "trainer.epochs=1", "reproducibility=fast"


@pytest.mark.parametrize("job", SMALL_JOBS, ids=job_name)
def test_three_sgd_steps_give_the_same_weights(job, train_with, three_sgd_steps):
    single, other = (train_with(*which, *three_sgd_steps).weights() for which in (("single", 1), job))
    assert np.linalg.norm(other - single) <= 1e-6 * np.linalg.norm(single)


@pytest.mark.parametrize("job", [("single", 1), ("mirrored", 2), ("multiworker", 2), ("horovod", 2)], ids=job_name)
def test_xla_gives_the_same_weights(job, train_with, three_sgd_steps):
    """As one program an epoch where there are no collectives, which XLA cannot compile."""
    single, other = train_with("single", 1, *three_sgd_steps), train_with(*job, *three_sgd_steps, "compile=xla")
    assert np.linalg.norm(other.weights() - single.weights()) <= 1e-6 * np.linalg.norm(single.weights())


@pytest.mark.parametrize("job", MNIST_JOBS, ids=job_name)
def test_the_recipe_gives_the_same_losses_and_counts(job, train_with, one_epoch_of_mnist):
    single, other = (train_with(*which, *one_epoch_of_mnist) for which in (("single", 1), job))
    first, second = (run.history.epochs[0] for run in (single, other))
    assert (first.weights_sha256, second.weights_sha256) == (None, None)  # fast does not promise the same bits
    assert second.loss == pytest.approx(first.loss, rel=1e-3)
    assert second.val_loss == pytest.approx(first.val_loss, rel=1e-2)
    for split in ("val", "test"):
        assert abs(other.summary[split]["num_correct"] - single.summary[split]["num_correct"]) <= 10


@pytest.mark.parametrize("job", [("single", 1), *MNIST_JOBS], ids=job_name)
def test_counts_are_numpys_on_the_saved_weights(job, train_with, one_epoch_of_mnist, mnist_path):
    job = train_with(*job, *one_epoch_of_mnist)
    data = compose_config("data=mnist", f"data.path={mnist_path}").data
    splits = preprocess(load_dataset(data), val_fraction=data.val_fraction, split_seed=data.split_seed)
    weights = [w.astype(np.float64) for w in keras.models.load_model(job.folder / "model.keras").get_weights()]
    for split, num_examples in [("val", 10_500), ("test", 10_000)]:
        outputs = splits[split].images
        for kernel, bias in zip(weights[::2], weights[1::2], strict=True):
            outputs = np.maximum(outputs, 0) @ kernel + bias  # the pixels are not negative, so ReLU leaves them alone
        correct = (outputs.argmax(axis=1) == splits[split].labels.argmax(axis=1)).sum()
        assert job.summary[split]["num_correct"] == correct
        assert job.summary[split]["num_examples"] == num_examples


@pytest.mark.parametrize("job", [("multiworker", 2), ("horovod", 3)], ids=job_name)
def test_ranks_end_with_the_same_weights_and_only_rank_0_writes(job, train_with, one_epoch_of_mnist):
    run = train_with(*job, *one_epoch_of_mnist)
    assert len(run.ranks) == job[1]
    for rank in run.ranks:
        assert rank["weights_sha256"] == [run.summary["weights_sha256"]]
    assert len({json.dumps(rank["slots_sha256"]) for rank in run.ranks}) == 1
    assert run.ranks[0]["opened"]
    assert [rank["opened"] for rank in run.ranks[1:]] == [[]] * (job[1] - 1)


@pytest.mark.parametrize("job", MNIST_JOBS, ids=job_name)
def test_the_summary_says_where_it_ran(job, train_with, one_epoch_of_mnist):
    strategy, size = job
    summary = train_with(*job, *one_epoch_of_mnist).summary
    assert summary["strategy"] == strategy
    assert summary["num_replicas"] == size
    assert summary["world_size"] == (1 if strategy == "mirrored" else size)
    assert summary["reproducibility"] == "fast"
    assert summary["global_batch_size"] == 512
    assert summary["per_replica_batch_size"] == -(-512 // size)


@pytest.mark.parametrize("job", [("multiworker", 2), ("horovod", 3)], ids=job_name)
def test_variables_start_with_rank_0s_value(job, run_job, tmp_path):
    script = tmp_path / "broadcast.py"
    script.write_text(
        "import sys, numpy as np\n"
        "from mnist_dist.config.compose import compose_config\n"
        "from mnist_dist.strategy.choose import create_strategy\n"
        "from mnist_dist.launch.environment import read_topology\n"
        "from mnist_dist.launch.rendezvous import Rendezvous\n"
        "topology = read_topology()\n"
        "rendezvous = Rendezvous(topology, timeout_s=60)\n"
        "strategy = create_strategy(compose_config(*sys.argv[1:]).strategy, rendezvous, num_gpus=0)\n"
        "variable = strategy.create_variable(np.full(3, 5.0 + topology.rank, np.float32))\n"
        f"np.save({str(tmp_path)!r} + f'/{{topology.rank}}.npy', strategy.read(variable))\n"
        "rendezvous.exchange('', topic='end')\n"  # a rank that leaves would break collectives that others still end
    )
    for result in run_job(job, script=[str(script)], launcher="srun"):
        assert result.returncode == 0, result.stderr + result.stdout
    values = [np.load(tmp_path / f"{rank}.npy").tolist() for rank in range(job[1])]
    assert values == [[5.0, 5.0, 5.0]] * job[1]


def test_one_run_folder_even_when_started_seconds_apart(run_job, small_npz, tmp_path):
    args = ["data=npz", f"data.path={small_npz}", "trainer.epochs=1"]
    results = run_job(("multiworker", 2), *args, delays_s={1: 2.5}, cwd=tmp_path)
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    (folder,) = (tmp_path / "runs").iterdir()  # both named it after the time, seconds apart
    assert (folder / "summary.json").is_file()


@pytest.mark.parametrize("launcher", ["srun", None], ids=["without a launcher", "horovodrun"])
def test_one_rank_of_horovod(launcher, run_job, small_npz, tmp_path):
    args = ["data=npz", f"data.path={small_npz}", "trainer.epochs=1", f"run_dir={tmp_path / 'run'}"]
    (result,) = run_job(("horovod", 1), *args, launcher=launcher)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["strategy"], summary["world_size"], summary["num_replicas"]) == ("horovod", 1, 1)


def test_only_rank_0_prints(train_with, one_epoch_of_mnist):
    chief, other = train_with("multiworker", 2, *one_epoch_of_mnist).outputs
    assert "Epoch 1/1" in chief
    assert other == ""
    chief, other = train_with("horovod", 3, *one_epoch_of_mnist).outputs[:2]
    assert chief.count("Epoch 1/1") == 1
    assert other == ""


def test_weak_scaling_gives_each_replica_a_whole_batch(small_npz, run_python, tmp_path):
    result = run_python(
        "-m", "mnist_dist.train", "data=npz", f"data.path={small_npz}", "strategy=mirrored", "strategy.num_replicas=2",
        "batch.global_size=50", "batch.scaling=weak", "learning_rate.scaling=linear", "learning_rate.warmup_epochs=1",
        "trainer.epochs=2", f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["global_batch_size"], summary["per_replica_batch_size"]) == (100, 50)
    rates = from_csv((tmp_path / "run" / "history.csv").read_text()).column("learning_rate")
    assert rates == pytest.approx([0.002, 0.002])


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_trains_and_saves_plain_float32(policy, small_npz, run_python, tmp_path):
    result = run_python(
        "-m", "mnist_dist.train", "data=npz", f"data.path={small_npz}", f"precision={policy}", "trainer.epochs=8",
        "batch.global_size=32", f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["precision"] == policy
    assert summary["test"]["accuracy"] > 0.8
    model = keras.models.load_model(tmp_path / "run" / "model.keras")
    assert {layer.dtype_policy.name for layer in model.layers} == {"float32"}
