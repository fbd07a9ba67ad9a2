"""Evaluate a saved model: `python -m mnist_dist.evaluate run_dir=runs/... split=test`."""

import json
import logging
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import MISSING

from mnist_dist.base.console import Console
from mnist_dist.base.errors import EXIT_OK, UserError
from mnist_dist.cli.main import run
from mnist_dist.config.compose import Command
from mnist_dist.config.data import DataConfig
from mnist_dist.config.devices import ThreadsConfig
from mnist_dist.config.rules import Checked, one_of, ruled
from mnist_dist.config.train import ConsoleConfig
from mnist_dist.data.dataset import ImageDataset
from mnist_dist.data.load import load_dataset
from mnist_dist.data.splits import SplitName, Splits, preprocess
from mnist_dist.engine.footprint import check_data_fits
from mnist_dist.launch.topology import Topology
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.inspection import MODEL_ADVICE, check_has_model, read_data_config, read_data_sha256, read_own_model
from mnist_dist.run.summary import MODEL

if TYPE_CHECKING:
    from mnist_dist.engine.flat_model import FlatModel

log = logging.getLogger("mnist_dist.evaluate")  # __name__ is __main__ when run with -m


@dataclass
class EvaluateDataConfig:
    """Where a run's data is now."""

    path: str | None = None
    """The data file, if it has moved since the training."""


@dataclass
class EvaluateConfig(Checked):
    """All keys of `python -m mnist_dist.evaluate`."""

    run_dir: str | None = ruled(
        lambda value: value is not None, "say which run to evaluate: run_dir=runs/...", default=None
    )
    """The run folder to evaluate."""
    split: str = one_of("train", "val", "test")
    """train | val | test."""
    data: EvaluateDataConfig = MISSING
    console: ConsoleConfig = MISSING


def evaluate(config: EvaluateConfig, topology: Topology, console: Console) -> int:
    """Evaluate `model.keras` of a run on one split of its data; returns the exit code."""
    if topology.world_size > 1:
        raise UserError(f"{topology.world_size} processes were started; evaluation needs one")
    run_folder = RunFolder.from_config(config.run_dir)
    split_name = cast(SplitName, config.split)
    report_name, picture_name = f"evaluation_{split_name}.json", f"confusion_matrix_{split_name}.png"
    check_has_model(run_folder.path)
    model_path = run_folder.path / MODEL
    data_config = read_data_config(run_folder.path)
    run_folder.check_usable(files=[report_name, f"plots/{picture_name}"], folders=["plots"])
    trained_on = read_data_sha256(run_folder.path)
    dataset = _load_data(config, data_config)
    if dataset.sha256 != trained_on:
        raise UserError(
            f"run_dir={run_folder.path}: the model was trained on other data (SHA-256 {trained_on[:12]}..., now "
            f"{dataset.sha256[:12]}...); give the original file as data.path=..."
        )
    check_data_fits(data_config, dataset)
    splits = preprocess(dataset, val_fraction=data_config.val_fraction, split_seed=data_config.split_seed)

    # Importing TensorFlow takes seconds, so it comes after everything that may refuse the input.
    with console.tensorflow_start(messages=config.console.tensorflow_messages):
        from mnist_dist.engine.programs.evaluate import EvaluateProgram
        from mnist_dist.engine.programs.placement import place_split
        from mnist_dist.engine.runtime import configure_tensorflow
        from mnist_dist.results.confusion import class_report, plot_confusion_matrix
        from mnist_dist.strategy.base import SingleDevice

        configure_tensorflow(ThreadsConfig("auto", "auto"), topology, num_shards=10, exact=True)
        strategy = SingleDevice()
        flat_model = _load_model(run_folder.path, splits)

    program = EvaluateProgram(flat_model, strategy=strategy, split=place_split(splits[split_name], strategy))
    sums = program.run([strategy.create_variable(vector) for vector in flat_model.vectors()])
    if not math.isfinite(sums.loss):
        problem = f"its loss on the {split_name} set is {sums.loss}"
        raise UserError(f"{model_path}: not a usable model: {problem}; {MODEL_ADVICE}")

    report = {
        "dataset": {"name": dataset.name, "sha256": dataset.sha256},
        "split": split_name,
        **asdict(sums.metrics()),
        "classes": class_report(sums.confusion, class_names=splits.class_names),
        "confusion_matrix": sums.confusion.tolist(),
    }
    run_folder.write_text(report_name, json.dumps(report, indent=2, allow_nan=False) + "\n")
    picture = plot_confusion_matrix(
        sums.confusion, dataset=dataset.name, split=split_name, class_names=splits.class_names
    )
    run_folder.write_plots([(picture_name, picture)])
    _log_report(report, run_folder)
    return EXIT_OK


def _load_model(run_dir: Path, splits: Splits) -> "FlatModel":
    from mnist_dist.engine.flat_model import load_flat_model
    from mnist_dist.models.factory import load_factory

    not_found: UserError | None = None
    if (own_model := read_own_model(run_dir)) is not None:
        try:
            load_factory(own_model)  # its module may have layers
        except UserError as error:
            not_found = error  # which matters only if it has
    try:
        return load_flat_model(run_dir / MODEL, image_shape=splits.image_shape, num_classes=splits.num_classes)
    except ValueError as error:
        if not_found is not None:
            raise not_found from error
        raise UserError(f"{run_dir / MODEL}: not a usable model: {error}; {MODEL_ADVICE}") from error


def _load_data(config: EvaluateConfig, trained_on: DataConfig) -> ImageDataset:
    if config.data.path is not None:
        if trained_on.name not in ("mnist", "npz"):
            raise UserError(f"data.path={config.data.path}: the run was trained on {trained_on.name}; omit it")
        return load_dataset(replace(trained_on, path=config.data.path))
    try:
        return load_dataset(trained_on)
    except UserError as error:
        if trained_on.path is None:
            raise
        raise UserError(f"{error}; this path is from config.yaml: if the data has moved, give data.path=...") from error


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
    run(Command("evaluate", EvaluateConfig), evaluate)


if __name__ == "__main__":
    main()
