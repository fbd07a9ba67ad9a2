"""Evaluate a saved model: `python -m mnist_dist.evaluate run_dir=runs/... split=test`."""

import logging
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from mnist_dist import cli
from mnist_dist.artifacts import RunFolder
from mnist_dist.config import EvaluateConfig, ThreadsConfig
from mnist_dist.console import Console
from mnist_dist.data.preprocess import SplitName, preprocess
from mnist_dist.data.sources import ImageDataset, load_dataset
from mnist_dist.errors import EXIT_OK, UserError
from mnist_dist.footprint import check_data_fits
from mnist_dist.topology import Topology

log = logging.getLogger("mnist_dist.evaluate")  # __name__ is __main__ when run with -m


def evaluate(config: EvaluateConfig, topology: Topology, console: Console) -> int:
    """Evaluate `model.keras` of a run on one split of its data; returns the exit code."""
    if topology.world_size > 1:
        raise UserError(f"{topology.world_size} processes were started; evaluation needs one")
    run_folder = RunFolder.from_config(config.run_dir)
    split_name = cast(SplitName, config.split)
    run_folder.check_has_model()
    data_config = run_folder.read_data_config()
    run_folder.check_usable()
    if config.data.path is not None:
        data_config = replace(data_config, path=config.data.path)
    dataset = load_dataset(data_config)
    _check_same_data(dataset, run_folder)
    check_data_fits(data_config, dataset)
    splits = preprocess(dataset, val_fraction=data_config.val_fraction, split_seed=data_config.split_seed)

    # Importing TensorFlow takes seconds, so it comes after everything that may send the user back.
    with console.tensorflow_start(messages=config.console.tensorflow_messages):
        from mnist_dist import plots
        from mnist_dist.model import Network, load_model
        from mnist_dist.runtime import configure_tensorflow
        from mnist_dist.steps import EvaluateProgram, place_split
        from mnist_dist.strategy.base import SingleDevice

        configure_tensorflow(ThreadsConfig("auto", "auto"), topology, num_shards=10, deterministic=False)
        strategy = SingleDevice()

    network = Network(load_model(run_folder.model_path))
    program = EvaluateProgram(network=network, strategy=strategy, split=place_split(splits[split_name], strategy))
    sums = program.run(strategy.create_variable(network.get_weights()))

    report = {
        "dataset": {"name": dataset.name, "sha256": dataset.sha256},
        "split": split_name,
        **sums.to_dict(),
        "classes": class_report(sums.confusion, class_names=splits.class_names),
        "confusion_matrix": sums.confusion.tolist(),
    }
    run_folder.write_json(f"evaluation_{split_name}.json", report)
    picture = plots.plot_split(sums.confusion, dataset=dataset.name, split=split_name, class_names=splits.class_names)
    run_folder.write_plots([(f"confusion_matrix_{split_name}.png", picture)])
    _log_report(report, run_folder)
    return EXIT_OK


def class_report(confusion: npt.NDArray[np.int64], *, class_names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 score and support (examples) of each class, by scikit-learn.

    `confusion` has the shape (num_classes, num_classes); [i, j] counts examples of class i taken for class j. A class
    that was never predicted has precision 0.
    """
    from sklearn.metrics import precision_recall_fscore_support

    # A confusion matrix is all that the scores depend on, so it stands for the examples.
    actual, predicted = (np.repeat(side, confusion.reshape(-1)) for side in np.indices(confusion.shape).reshape(2, -1))
    columns = precision_recall_fscore_support(actual, predicted, labels=range(len(class_names)), zero_division=0)
    keys = ("precision", "recall", "f1", "support")
    return {
        name: dict(zip(keys, (column[index].item() for column in columns), strict=True))
        for index, name in enumerate(class_names)
    }


def _check_same_data(dataset: ImageDataset, run_folder: RunFolder) -> None:
    trained_on = run_folder.read_data_sha256()
    if dataset.sha256 != trained_on:
        raise UserError(
            f"run_dir={run_folder.path}: the model was trained on other data (SHA-256 {trained_on[:12]}..., now "
            f"{dataset.sha256[:12]}...); give the original file as data.path=..."
        )


def _log_report(report: dict[str, Any], run_folder: RunFolder) -> None:
    width = max(5, *map(len, report["classes"]))
    log.info("%*s  precision  recall      f1  support", width, "class")
    for name, row in report["classes"].items():
        values = (row[key] for key in ("precision", "recall", "f1", "support"))
        log.info("%*s  %9.4f  %6.4f  %6.4f  %7d", width, name, *values)
    log.info(
        "%s set of %s - loss: %.4f - accuracy: %.4f (%d of %d)",
        report["split"],
        report["dataset"]["name"],
        *(report[key] for key in ("loss", "accuracy", "num_correct", "num_examples")),
    )
    log.info("Results: %s", run_folder.path / f"evaluation_{report['split']}.json")


def main() -> None:
    """The console script."""
    cli.run(evaluate, config_name="evaluate")


if __name__ == "__main__":
    main()
