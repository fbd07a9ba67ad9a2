"""Networks of the user's own, as users train them: the same bits on any strategy, over kills, and clear refusals."""

import json
import shutil
import signal

import keras
import numpy as np
import pytest
from support import CHECKOUT
from support.data import write_part
from support.hooks import WRITE_HOOK, WriteHook
from support.job import HOROVOD, MIRRORED, SINGLE, TRAIN, job_name
from support.runs import history_of, result_of

from mnist_dist.base.errors import EXIT_LOST_PEER, EXIT_USER_ERROR
from mnist_dist.engine.flat_model import FlatModel
from mnist_dist.results.sums import weights_digest

# One process has all of them, as they share what takes long to make.
pytestmark = pytest.mark.xdist_group("own_model")

EXAMPLE = CHECKOUT / "examples" / "own_model"
FACTORIES = CHECKOUT / "tests" / "support" / "factories"
RESIDUAL = ("model=keras", "model.factory=residual:build", "model.args={width: 4}", "batch.global_size=256")
MULTIWORKER = ("multiworker", 2)
CHECK_MODEL = ("-m", "mnist_dist.check_model")
NUM_EPOCHS = 2


@pytest.fixture(scope="module")
def digits(mnist_path, tmp_path_factory):
    """Of MNIST; 990 examples in 4 batches, of which the last one has 222: a shard of 32 has none of them."""
    return write_part(mnist_path, tmp_path_factory.mktemp("part"), num_train=1200, num_test=200)


@pytest.fixture(scope="module")
def residual(train_with, digits):
    """Train the example, in its folder."""

    def train(job):
        return train_with(*job, *RESIDUAL, *digits, f"trainer.epochs={NUM_EPOCHS}", cwd=EXAMPLE)

    return train


EVERYTHING = (
    *("model=keras", "model.factory=residual:build", "model.args={width: 8}", "augment=affine"),
    *("optimizer=adamw", "optimizer.weight_decay=0.05", "gradient_clip_norm=0.5", "loss.label_smoothing=0.1"),
    *("learning_rate.schedule=one_cycle", "learning_rate.rise_fraction=0.4", "optimizer.learning_rate=0.01"),
)
WITH_EVERYTHING = [MIRRORED, ("mirrored", 3), MULTIWORKER, HOROVOD, ("horovod", 3)]


@pytest.fixture(scope="module")
def everything(train_with, part_of_mnist):
    """Train the example for two epochs with every choice that a recipe can have."""

    def train(job):
        return train_with(*job, *EVERYTHING, *part_of_mnist, "trainer.epochs=2", cwd=EXAMPLE)

    return train


@pytest.mark.parametrize("job", WITH_EVERYTHING, ids=job_name)
def test_everything_at_once_gives_the_same_bits(job, everything):
    single, other = everything(SINGLE), everything(job)
    assert single.summary["reproducibility"] == "exact"
    assert result_of(other.folder) == result_of(single.folder)
    assert len({row.weights_sha256 for row in single.history.epochs}) == 2
    assert copies(other) == copies(single)
    assert len(copies(single)) == 1


def test_everything_at_once_killed_and_resumed_on_another_size(everything, part_of_mnist, start, tmp_path):
    """kill -9 of one of three ranks while it saves epoch 2; then one process, with two replicas."""
    folder = tmp_path / "run"
    arguments = [*EVERYTHING, *part_of_mnist, f"run_dir={folder}", "trainer.epochs=2"]
    env = WriteHook("epoch-00002.ckpt", moment=0.5).environment()
    process = start(("horovod", 3), *arguments, script=WRITE_HOOK, env=env, launcher="srun", cwd=EXAMPLE)
    assert process.codes() == [-signal.SIGKILL, EXIT_LOST_PEER, EXIT_LOST_PEER], process.output()
    process = start(MIRRORED, *arguments, cwd=EXAMPLE)
    assert process.codes() == [0], process.output()
    assert "Resuming after epoch 1 of 2" in process.output()
    assert result_of(folder) == result_of(everything(SINGLE).folder)


@pytest.mark.parametrize("job", [MIRRORED, HOROVOD, MULTIWORKER], ids=job_name)
def test_the_example_gives_the_same_bits(job, residual):
    """On every replica, with the moving averages and the optimizer's slots."""
    single, other = residual(SINGLE), residual(job)
    assert single.summary["reproducibility"] == "exact"
    assert result_of(other.folder) == result_of(single.folder)
    assert len({row.weights_sha256 for row in single.history.epochs}) == NUM_EPOCHS  # it did train
    (alone,) = copies(single)
    assert len(set(alone)) == 4  # weights, averages, and Adam's two slots
    assert copies(other) == {alone}
    assert sum(len(rank["weights_sha256"]) for rank in other.ranks) == job[1]


def copies(job) -> set[tuple[str, ...]]:
    """Digests of the final weights, moving averages and optimizer slots, for every replica of every process."""
    return {
        replica
        for rank in job.ranks
        for replica in zip(rank["weights_sha256"], *rank["averages_sha256"], *rank["slots_sha256"], strict=True)
    }


PLAIN_KERAS = """
import json, sys
sys.modules["mnist_dist"] = None  # cannot be imported
import keras, numpy as np
model = keras.models.load_model(sys.argv[1])
assert not any("mnist_dist" in name for name in sys.modules if name != "mnist_dist")
norms = [layer for layer in model.layers if "norm" in layer.name]
image = np.linspace(0, 1, 784, dtype="float32").reshape(1, 28, 28, 1)
print(json.dumps({
    "kinds": sorted({f"{type(layer).__module__}.{type(layer).__name__}" for layer in norms}),
    "means": [layer.moving_mean.numpy().tolist() for layer in norms],
    "variances": [layer.moving_variance.numpy().tolist() for layer in norms],
    "dtypes": sorted({variable.dtype for variable in model.variables}),
    "compiled": model.compiled,
    "sum": float(model.predict(image, verbose=0).sum()),
}))
"""


def test_the_saved_model_is_plain_keras(residual, run_python):
    result = run_python("-c", PLAIN_KERAS, residual(SINGLE).folder / "model.keras", fresh=True)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout.splitlines()[-1])
    assert len(told["kinds"]) == 1
    assert told["kinds"][0].startswith("keras.src.layers.normalization.batch_normalization.")
    assert len(told["means"]) == 5
    for means, variances in zip(told["means"], told["variances"], strict=True):
        assert all(np.array(means) != 0)
        assert all(np.array(variances) != 1)
        assert all(np.array(variances) > 0)
    assert not told["compiled"]
    vectors = FlatModel(keras.models.load_model(residual(SINGLE).folder / "model.keras")).vectors()
    assert len(vectors) == 2
    assert weights_digest(*vectors) == residual(SINGLE).summary["weights_sha256"]
    assert told["sum"] == pytest.approx(1)


def test_killed_and_resumed_on_another_strategy(residual, digits, start, tmp_path):
    """kill -9 of one of two ranks while it saves epoch 2; one process with two replicas goes on after epoch 1."""
    folder = tmp_path / "run"
    arguments = [*RESIDUAL, *digits, f"run_dir={folder}", f"trainer.epochs={NUM_EPOCHS}"]
    env = WriteHook("epoch-00002.ckpt", moment=0.5).environment()
    process = start(HOROVOD, *arguments, script=WRITE_HOOK, env=env, launcher="srun", cwd=EXAMPLE)
    assert process.codes() == [-signal.SIGKILL, EXIT_LOST_PEER], process.output()
    process = start(MIRRORED, *arguments, cwd=EXAMPLE)
    assert process.codes() == [0], process.output()
    assert "Resuming after epoch 1 of 2" in process.output()
    assert result_of(folder) == result_of(residual(SINGLE).folder)


EVALUATE = ("-m", "mnist_dist.evaluate")


def test_evaluated_in_any_folder(residual, run_python, tmp_path):
    """Layers of Keras need no module of the user's."""
    folder = shutil.copytree(residual(SINGLE).folder, tmp_path / "run")
    result = run_python(*EVALUATE, f"run_dir={folder}", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    told = json.loads((folder / "evaluation_test.json").read_text())
    assert told["num_correct"] == residual(SINGLE).summary["test"]["num_correct"]


def test_layers_of_the_users_own(run_job, small_npz, run_python, tmp_path):
    """The module is needed again, which registers nothing with Keras: to resume and to evaluate."""
    args = "model=keras", "model.factory=own_layers:build", "data=npz", f"data.path={small_npz}"
    for job, epochs in ((SINGLE, 1), (MIRRORED, 2)):
        (result,) = run_job(job, *args, f"trainer.epochs={epochs}", f"run_dir={tmp_path / 'run'}", cwd=FACTORIES)
        assert result.returncode == 0, result.stderr
    result = run_python(*EVALUATE, f"run_dir={tmp_path / 'run'}", cwd=FACTORIES)
    assert (result.returncode, result.stderr) == (0, "")
    result = run_python(*EVALUATE, f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    check_line(result, "own_layers:build", "cannot be imported: ModuleNotFoundError")


# Bad input


REFUSED = [
    ("nowhere:build", (), "cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
    ("wrong_syntax:build", (), "cannot be imported: SyntaxError: "),
    ("raising:build", (), "cannot be imported: KeyError: 'nothing' (raising.py, line 2)"),
    ("refused:absent", (), "refused.py has no function absent"),
    ("refused:NUMBER", (), "NUMBER is int, not a function"),
    ("refused:good", ("model.args={depth: 3}",), "fails: TypeError: good() got an unexpected keyword argument 'depth'"),
    ("refused:raises", (), "fails: FileNotFoundError: no weights at /nowhere (refused.py, line "),
    ("refused:number", (), "returns int, not a keras.Model"),
    ("refused:compiled", (), "returns a compiled model; leave out compile()"),
    ("refused:integers", (), "takes uint8; images are float32, from 0 to 1"),
    ("refused:too_wide", (), "its output for an image has the shape (7,); the data has 4 classes"),
    ("refused:linear", (), "must end in a layer with softmax activation"),
    ("refused:failing", (), "fails: RuntimeError: no such thing (refused.py, line "),
    ("refused:failing_while_training", (),
     "cannot be trained: failing_while_training (FailingWhileTraining): RuntimeError: not yet written (refused.py, "),
    ("refused:of_one_name", (), "cannot be trained: same (Dense): has the name of another layer"),
    ("refused:not_saved", (), "cannot be trained: unsaved (Unsaved): Unsaved.__init__() got an unexpected "),
    ("refused:mixing", (), "cannot be trained: centred (Centred): what it gives for an image depends on the other "),
    ("refused:in_python", ("reproducibility=exact",), "needs reproducibility=fast: in_python (InPython): computes in "),
    ("refused:huge", (), "refused:huge: the network has 3,450,000,000,004 parameters, for which this process would "),
]  # fmt: skip


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory):
    """A user's folder with modules of all kinds."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "refused.py").write_text((FACTORIES / "refused.py").read_text() + "\n\nNUMBER = 3\n")
    (folder / "wrong_syntax.py").write_text("def build(:\n    pass\n")
    (folder / "raising.py").write_text("settings = {}\nwidth = settings['nothing']\n")
    return folder


@pytest.fixture(scope="module")
def own(own_folder, small_npz):
    """The arguments for a factory there."""
    return lambda factory: ("model=keras", f"model.factory={factory}", "data=npz", f"data.path={small_npz}")


def check_line(result, factory, fragment, *, prefix="") -> None:
    """One line with exit code 2, short and plain."""
    assert result.returncode == 2, result.stdout + result.stderr
    # Horovod adds a line of its own if the other rank has ended first.
    (line,) = [line for line in result.stderr.splitlines() if "Horovod background loop" not in line]
    assert line.startswith(f"{prefix}error: model.factory={factory}")
    assert fragment in line
    assert len(line) < 500
    assert line.isprintable()  # no escape codes


@pytest.mark.parametrize(("factory", "more", "fragment"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_cannot_be_trained_is_refused(factory, more, fragment, own, own_folder, run_python, tmp_path):
    run_dir = tmp_path / "run"
    result = run_python(*TRAIN, *own(factory), *more, f"run_dir={run_dir}", cwd=own_folder)
    check_line(result, factory, fragment)
    assert not run_dir.exists()


def test_check_model_gives_a_verdict_on_every_layer(own, own_folder, run_python):
    result = run_python(*CHECK_MODEL, *own("refused:mixing"), cwd=own_folder)
    check_line(result, "refused:mixing", "cannot be trained: centred (Centred): what it gives")
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0] == ["layer", "kind", "weights", "verdict", "why"]
    assert [(row[0], row[3]) for row in rows[1:]] == [
        ("flatten", "exact"), ("dense", "exact"), ("centred", "refused"), ("output", "exact"),
    ]  # fmt: skip


def test_check_model_of_a_network_that_can_be_trained(own, own_folder, run_python):
    result = run_python(*CHECK_MODEL, *own("refused:good"), "model.args={width: 3}", cwd=own_folder)
    assert (result.returncode, result.stderr) == (0, "")
    last = result.stdout.splitlines()[-1]
    assert last == "refused:good: 211 weights to train; images of 8x8, 4 classes; every layer can be trained"


@pytest.mark.parametrize("job", [HOROVOD, MULTIWORKER], ids=job_name)
def test_all_ranks_end_when_a_network_is_refused(job, own, own_folder, run_job, tmp_path):
    results = run_job(job, *own("refused:mixing"), f"run_dir={tmp_path / 'run'}", launcher="srun", cwd=own_folder)
    check_line(results[0], "refused:mixing", "centred (Centred)")
    check_line(results[1], "refused:mixing", "centred (Centred)", prefix="[rank 1/2] ")
    assert not (tmp_path / "run").exists()


def test_a_network_that_one_rank_cannot_build(own, own_folder, run_job, tmp_path):
    arguments = *own("refused:only_on_rank_0"), f"run_dir={tmp_path / 'run'}"
    results = run_job(HOROVOD, *arguments, launcher="srun", cwd=own_folder)
    problem = "model.factory=refused:only_on_rank_0: fails: FileNotFoundError: no weights here"
    for result in results:
        assert result.returncode == 2, result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert results[0].stderr.startswith(f"error: rank 1 (127.0.0.1) ended: {problem}")
    assert results[1].stderr.startswith(f"[rank 1/2] error: {problem}")


def test_pretrained_weights(residual, digits, run_job, tmp_path):
    """Two ranks start from them, and go on without the file; a file that is missing or foreign is refused."""
    pretrained, folder = tmp_path / "start.keras", tmp_path / "run"
    shutil.copy(residual(SINGLE).folder / "model.keras", pretrained)

    def train(job, *more):
        words = [*RESIDUAL, *digits, f"run_dir={folder}", f"model.pretrained={pretrained}", *more]
        return run_job(job, *words, cwd=EXAMPLE)

    for result in train(MIRRORED, "trainer.epochs=1"):
        assert result.returncode == 0, result.stderr
    first = history_of(folder).epochs[0]
    assert first.loss < history_of(residual(SINGLE).folder).epochs[0].loss  # it did not start anew
    pretrained.unlink()
    for result in train(SINGLE, "trainer.epochs=2"):
        assert result.returncode == 0, result.stderr
    assert len(history_of(folder).epochs) == 2
    shutil.rmtree(folder)
    (result,) = train(SINGLE)
    assert result.returncode == EXIT_USER_ERROR
    assert result.stderr.strip().endswith(
        f"model.pretrained={pretrained}: no such file; give the path of a model.keras"
    )
    pretrained.write_bytes(b"not a model")
    (result,) = train(SINGLE)
    assert result.returncode == EXIT_USER_ERROR
    assert f"model.pretrained={pretrained}: not a usable model: " in result.stderr
    assert not folder.exists()


@pytest.mark.parametrize("job", [SINGLE, HOROVOD], ids=job_name)
def test_resumed_with_another_network(job, run_job, digits, tmp_path):
    """Of other size: refused by all ranks. Only described differently: a warning, once."""
    (tmp_path / "net.py").write_text(
        "import keras, pathlib\n"
        "from keras import layers\n"
        "width, activation = pathlib.Path(__file__).with_suffix('.txt').read_text().split()\n"
        "def build():\n"
        "    hidden = [layers.Flatten(), layers.Dense(int(width), activation)]\n"
        "    return keras.Sequential([keras.Input((28, 28)), *hidden, layers.Dense(10, 'softmax')])\n"
    )

    def train(epochs, described):
        (tmp_path / "net.txt").write_text(described)
        words = [
            "model=keras",
            "model.factory=net:build",
            *digits,
            f"trainer.epochs={epochs}",
            f"run_dir={tmp_path}/run",
        ]
        return run_job(job, *words, cwd=tmp_path, launcher="srun" if job == HOROVOD else None)

    assert [result.returncode for result in train(1, "4 relu")] == [0] * job[1]
    results = train(2, "5 relu")
    assert [result.returncode for result in results] == [EXIT_USER_ERROR] * job[1]
    assert "builds a network with 3985 weights now (to train + others); that of the run to resume has 3190;" in (
        results[0].stderr
    )
    results = train(2, "4 tanh")
    assert [result.returncode for result in results] == [0] * job[1], results[0].stderr
    assert (
        sum(result.stdout.count("WARNING: model.factory=net:build: builds another network") for result in results) == 1
    )
