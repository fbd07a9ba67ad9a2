import json
import re
import shutil

import keras
import numpy as np
import pytest
from sklearn.metrics import classification_report

from mnist_dist.results.confusion import class_report


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, small_npz, run_python):
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    result = run_python(
        "-m", "mnist_dist.train", "data=npz", f"data.path={small_npz}", "trainer.epochs=2", "batch.global_size=64",
        f"run_dir={folder}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_numbers_equal_the_summarys(split, run_dir, run_python):
    result = run_python("-m", "mnist_dist.evaluate", f"run_dir={run_dir}", f"split={split}")
    assert result.returncode == 0, result.stderr
    report = json.loads((run_dir / f"evaluation_{split}.json").read_text())
    expected = json.loads((run_dir / "summary.json").read_text())[split]
    assert {key: report[key] for key in expected} == expected
    assert (run_dir / "plots" / f"confusion_matrix_{split}.png").is_file()
    assert f"({expected['num_correct']} of {expected['num_examples']})" in result.stdout
    assert sum(row["support"] for row in report["classes"].values()) == expected["num_examples"]
    assert np.trace(report["confusion_matrix"]) == expected["num_correct"]


def test_moved_data_is_found_and_other_data_refused(run_dir, small_npz, small_arrays, run_python, tmp_path):
    moved = tmp_path / "moved.npz"
    moved.write_bytes(small_npz.read_bytes())
    assert run_python("-m", "mnist_dist.evaluate", f"run_dir={run_dir}", f"data.path={moved}").returncode == 0
    np.savez(moved, **{**small_arrays, "y_test": small_arrays["y_test"][::-1]})
    result = run_python("-m", "mnist_dist.evaluate", f"run_dir={run_dir}", f"data.path={moved}")
    assert result.returncode == 2
    assert "trained on other data" in result.stderr


def test_data_that_is_not_where_it_was(run_dir, run_python, tmp_path):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(re.sub(r"(?m)^  path: .*", "  path: gone.npz", config))
    result = run_python("-m", "mnist_dist.evaluate", f"run_dir={folder}", "split=train")
    assert (result.returncode, result.stdout, result.stderr) == (
        2,
        "",
        "error: data.path=gone.npz: cannot be read: No such file or directory; this path is from config.yaml: if the "
        "data has moved, give data.path=...\n",
    )
    (folder / "config.yaml").write_text(re.sub(r"(?m)^  path: .*", "  path: null", config.replace("npz", "digits")))
    result = run_python("-m", "mnist_dist.evaluate", f"run_dir={folder}", "data.path=gone.npz")
    assert (result.returncode, result.stderr) == (
        2,
        "error: data.path=gone.npz: the run was trained on digits; omit it\n",
    )


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        # On processors without AVX512-FP16, TensorFlow prints a line of its own about this product.
        ([keras.layers.Dense(4, activation="softmax", dtype="float16")], "weights must be float32; "),
        (
            [keras.layers.Dense(4, activation="softmax", kernel_initializer=keras.initializers.Constant(3e38))],
            "loss on",
        ),
    ],
    ids=["float16", "overflow"],
)
def test_a_model_that_cannot_be_used(parts, problem, run_dir, run_python, tmp_path):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    keras.Sequential([keras.Input((64,)), *parts]).save(folder / "model.keras")
    result = run_python("-m", "mnist_dist.evaluate", f"run_dir={folder}", "split=val")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {folder / 'model.keras'}: not a usable model: ")
    assert problem in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_class_report_is_scikit_learns():
    rng = np.random.default_rng(0)
    actual, predicted = rng.integers(3, size=200), rng.integers(2, size=200)  # class 2 is never predicted
    confusion = np.zeros((3, 3), np.int64)
    np.add.at(confusion, (actual, predicted), 1)
    ours = class_report(confusion, class_names=("a", "b", "c"))
    theirs = classification_report(actual, predicted, target_names=["a", "b", "c"], output_dict=True, zero_division=0)
    for name in ("a", "b", "c"):
        expected = [theirs[name][key] for key in ("precision", "recall", "f1-score", "support")]
        assert list(ours[name].values()) == pytest.approx(expected)
