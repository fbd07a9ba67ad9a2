"""Whole runs as a user starts them, on small data; and the recipe itself, on real MNIST."""

import json
import re

import keras
import numpy as np
import pytest
from PIL import Image

from mnist_dist.engine.flat_model import FlatModel
from mnist_dist.results.history import from_csv
from mnist_dist.results.sums import weights_digest

# One process has all of them, as they share what takes long to make.
pytestmark = pytest.mark.xdist_group("train")

FILES = {
    *("config.yaml", "history.csv", "summary.json", "model.keras", "plots", "train.log", "checkpoints"),
    *("events.jsonl", "predictions.npz", "report.html", ".holder.json"),
}
EPOCH_LINE = (
    r"Epoch (\d+)/3 - \d+\.\ds - loss: \d\.\d{4} - accuracy: \d\.\d{4} - val_loss: \d\.\d{4} - val_accuracy: \d\.\d{4}"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_npz, run_python):
    """One finished run of three epochs: the completed process and its folder."""
    folder = tmp_path_factory.mktemp("train") / "a run"
    result = run_python(
        "-m", "mnist_dist.train", "data=npz", f"data.path={small_npz}", "trainer.epochs=3", "batch.global_size=64",
        f"run_dir='{folder}'",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result, folder


def train_again(run_python, folder, *args, **options):
    """Start the run in `folder` again, from its own config.yaml."""
    return run_python(
        "-m", "mnist_dist.train", "--config-dir", str(folder), "--config-name", "config", *args, **options
    )


def test_the_run_folder_is_complete(run):
    _, folder = run
    assert {path.name for path in folder.iterdir()} == FILES
    for name in ("loss", "accuracy", "confusion_matrix"):
        with Image.open(folder / "plots" / f"{name}.png") as picture:
            assert min(picture.size) > 500


def test_output_is_plain_lines_and_the_log_holds_them(run):
    result, folder = run
    assert [match[1] for match in re.finditer(EPOCH_LINE, result.stdout)] == ["1", "2", "3"]
    for start in ("Data: npz", "Model: mlp", "Devices: ", "Batch: 64", "Run folder: ", "Avoidable bias", "Variance"):
        assert re.search(f"^{start}", result.stdout, re.MULTILINE), start
    assert (folder / "train.log").read_text() == result.stdout
    assert "\x1b" not in result.stdout
    assert result.stderr == ""  # TensorFlow's chatter is silenced


def test_tensorflow_prints_when_asked(run, run_python, tmp_path):
    result = train_again(run_python, run[1], f"run_dir={tmp_path}/x", "console.tensorflow_messages=true", fresh=True)
    assert result.returncode == 0
    assert "oneDNN" in result.stderr or "cuda" in result.stderr.lower()


def test_summary_agrees_with_history_and_model(run):
    _, folder = run
    summary = json.loads((folder / "summary.json").read_text())
    history = from_csv((folder / "history.csv").read_text())
    assert summary["status"] == "finished"
    assert history.epochs[-1].weights_sha256 == summary["weights_sha256"]
    assert summary["epochs_completed"] == len(history.epochs) == 3
    assert summary["val"]["accuracy"] == history.epochs[-1].val_accuracy
    assert summary["val"]["loss"] == history.epochs[-1].val_loss
    sizes = {name: summary["dataset"][f"num_{name}"] for name in ("train", "val", "test")}
    assert sizes == {name: summary[name]["num_examples"] for name in sizes}
    bias = 100 * (1 - summary["train"]["accuracy"])
    variance = 100 * (summary["train"]["accuracy"] - summary["val"]["accuracy"])
    assert summary["avoidable_bias_percent"] == pytest.approx(bias)
    assert summary["variance_percent"] == pytest.approx(variance)
    assert summary["timing"].keys() == {"startup_s", "first_epoch_s", "median_epoch_s", "total_s"}
    model = keras.models.load_model(folder / "model.keras")
    assert weights_digest(FlatModel(model).get_weights()) == summary["weights_sha256"]


def test_auto_is_exact_on_cpus_and_recorded(run):
    result, folder = run
    assert "Reproducibility: exact, 8 shards" in result.stdout
    assert "\nreproducibility: exact\n" in (folder / "config.yaml").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["reproducibility"], summary["num_shards"]) == ("exact", 8)


def test_the_saved_model_opens_in_plain_keras(run, small_arrays, run_python, tmp_path):
    """In a process that cannot import mnist_dist at all."""
    _, folder = run
    images = small_arrays["x_test"].reshape(len(small_arrays["x_test"]), -1).astype(np.float32) / 255
    np.save(tmp_path / "images.npy", images)
    code = (
        "import sys; sys.modules['mnist_dist'] = None; import keras, numpy as np\n"
        f"model = keras.models.load_model({str(folder / 'model.keras')!r})\n"
        f"np.save({str(tmp_path / 'out.npy')!r}, model.predict(np.load({str(tmp_path / 'images.npy')!r}), verbose=0))"
    )
    assert run_python("-c", code, fresh=True).returncode == 0
    probabilities = np.load(tmp_path / "out.npy")
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    summary = json.loads((folder / "summary.json").read_text())
    assert (probabilities.argmax(axis=1) == small_arrays["y_test"]).sum() == summary["test"]["num_correct"]


def test_passing_the_config_back_gives_the_same_bits(run, run_python, tmp_path):
    _, folder = run
    result = train_again(run_python, folder, f"run_dir={tmp_path / 'again'}")
    assert result.returncode == 0, result.stderr
    first, again = (json.loads((path / "summary.json").read_text()) for path in (folder, tmp_path / "again"))
    assert first["weights_sha256"] == again["weights_sha256"]
    assert first["test"] == again["test"]


def test_a_finished_run_is_left_alone(run, run_python):
    _, folder = run
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = train_again(run_python, folder)
    assert result.returncode == 0
    assert "finished: nothing to do" in result.stdout
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_another_configuration_does_not_use_the_folder(run, run_python):
    _, folder = run
    result = train_again(run_python, folder, "seed=1", "optimizer.learning_rate=0.5")
    assert result.returncode == 2
    assert "optimizer.learning_rate was 0.001, is now 0.5; seed was 0, is now 1" in result.stderr


def test_a_non_finite_loss_stops_the_run(small_npz, run_python, tmp_path):
    result = run_python(
        "-m", "mnist_dist.train", "data=npz", f"data.path={small_npz}", "trainer.epochs=3", "batch.global_size=64",
        "optimizer=sgd", "optimizer.learning_rate=1e30", f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert result.returncode == 1
    assert re.fullmatch(r"error: the training loss became \w+ at epoch \d+, step \d+ of 8; .*\n", result.stderr)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_the_default_run_folder_is_named_by_the_time(small_npz, run_python, tmp_path):
    args = ["data=npz", f"data.path={small_npz}", "trainer.epochs=1"]
    result = run_python("-m", "mnist_dist.train", *args, cwd=tmp_path)
    assert result.returncode == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", folder.name)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_the_trainer_does_not_depend_on_the_network(model, small_npz, run_python, tmp_path):
    result = run_python(
        "-m", "mnist_dist.train", "data=npz", f"data.path={small_npz}", f"model={model}", "trainer.epochs=12",
        "batch.global_size=32", "model.dropout=0.1", f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test"]["accuracy"] > 0.9


def test_the_recipe_on_mnist(mnist_path, run_python, tmp_path):
    """Two epochs follow the original run's curve (loss .7091 .2741, val_accuracy .9326 .9538)."""
    result = run_python(
        "-m", "mnist_dist.train", "data=mnist", f"data.path={mnist_path}", "trainer.epochs=2", "plots.reference=seed",
        f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "49500 training / 10500 validation / 10000 test images" in result.stdout
    assert "269,322 parameters" in result.stdout
    assert "97 steps an epoch" in result.stdout
    first, second = from_csv((tmp_path / "run" / "history.csv").read_text()).epochs
    assert first.loss == pytest.approx(0.7091, abs=0.03)
    assert second.loss == pytest.approx(0.2741, abs=0.02)
    assert first.val_accuracy == pytest.approx(0.9326, abs=0.01)
    assert second.val_accuracy == pytest.approx(0.9538, abs=0.01)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["dataset"]["name"] == "mnist"
