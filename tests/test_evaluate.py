import json

import numpy as np
import pytest
from sklearn.metrics import classification_report

from mnist_dist.evaluate import class_report


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
