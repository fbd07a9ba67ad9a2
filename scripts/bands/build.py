"""Builds `mnist_dist/verify/bands.json` and the tables of docs/bands.md anew.

    python scripts/bands/build.py --mnist mnist.npz

1. Trains the recipe with `SEEDS` on both data sets in both precisions, and with each of the faults (`faults.py`).
2. Chooses the numbers that are used, by the rule of docs/bands.md, and checks that they see what they must see.
3. Trains with `HOLD_OUT`, seeds that are used for nothing else: all must be inside.

It writes only what has passed. Trainings are remembered in `--folder`, so an interrupted build continues; after a
change of the engine or the faults, start with an empty folder.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import page
from faults import FAULTS, faults_in
from trainings import Records, Sources, Task, train_all

from mnist_dist.base.versions import installed_versions
from mnist_dist.config.compare import training_keys
from mnist_dist.data.load import load_dataset
from mnist_dist.verify import bands
from mnist_dist.verify.bands import NUMBERS, Band, Bands, measure, recipe_keys, subtract

DATASETS = ("digits", "mnist")
SEEDS = range(1000, 1128)
FAULT_SEEDS = SEEDS[:8]
HOLD_OUT = range(2000, 2016)
LEAST_EFFECT = 8
"""Standard deviations by which each fault that must be seen moves a number that is used."""
STORED = Path(bands.__file__).with_name("bands.json")
VERSIONS = ("python", "mnist-dist", "tensorflow", "keras", "numpy")


class Kind(NamedTuple):
    """What a set of bands is for."""

    precision: str
    paired: bool = False
    """Against float32 with the same seed."""


KINDS = (Kind("float32"), Kind("mixed_bfloat16"), Kind("mixed_bfloat16", paired=True))
PRECISIONS = ("float32", "mixed_bfloat16")


class Measured:
    """The numbers of all trainings."""

    def __init__(self, records: Records) -> None:
        nothing = dict.fromkeys(NUMBERS, float("nan"))
        self._numbers = {task: measure(trial) if trial else nothing for task, trial in records.trials.items()}

    def of(self, dataset: str, kind: Kind, seeds: Sequence[int], fault: str = "") -> list[dict[str, float]]:
        """Of each seed; paired kinds are compared with float32 without the fault."""
        found = [self._numbers[Task(dataset, kind.precision, seed, fault)] for seed in seeds]
        if not kind.paired:
            return found
        references = [self._numbers[Task(dataset, "float32", seed)] for seed in seeds]
        return [subtract(ours, reference) for ours, reference in zip(found, references, strict=True)]


def fit(numbers: Sequence[dict[str, float]]) -> dict[str, Band]:
    """A band for each number."""
    columns = {name: np.array([row[name] for row in numbers]) for name in NUMBERS}
    return {
        name: Band(name, values.mean().item(), values.std(ddof=1).item(), len(values))
        for name, values in columns.items()
    }


def find_effects(measured: Measured, dataset: str, kind: Kind) -> dict[str, dict[str, float]]:
    """For each fault, by how many standard deviations it moves each number: medians over `FAULT_SEEDS`."""
    fitted = fit(measured.of(dataset, kind, SEEDS))
    runs = {fault: measured.of(dataset, kind, FAULT_SEEDS, fault) for fault in faults_in(kind.precision)}
    return {
        fault: {
            name: float(np.median([(run[name] - band.mean) / band.std for run in runs[fault]]))
            for name, band in fitted.items()
        }
        for fault in runs
    }


def choose(effects: Sequence[dict[str, dict[str, float]]]) -> list[str]:
    """The numbers that every fault of their own stage that must be seen moves far enough, on every data set."""
    return [
        name
        for name, number in NUMBERS.items()
        if not any(
            abs(found[fault][name]) < LEAST_EFFECT  # false for NaN, of trainings that fail by themselves
            for found in effects
            for fault in found
            if FAULTS[fault].kind == "must" and FAULTS[fault].stage == number.stage
        )
    ]


def count_outcomes(judge: Bands, runs: Sequence[dict[str, float]]) -> dict[str, int]:
    """How many runs had which outcome."""
    return dict(Counter(judge.judge([run]).outcome for run in runs))


def leave_one_out(numbers: Sequence[dict[str, float]], used: Sequence[str]) -> dict[str, int]:
    """Each seed, judged by the bands of all others."""
    outcomes: Counter[str] = Counter()
    for index, run in enumerate(numbers):
        fitted = fit([*numbers[:index], *numbers[index + 1 :]])
        outcomes[Bands(tuple(fitted[name] for name in used)).judge([run]).outcome] += 1
    return dict(outcomes)


def describe(measured: Measured, dataset: str, kind: Kind, *, used: Sequence[str]) -> dict[str, Any]:
    """The entry of `bands.json`, but for the hold-out; fails if a fault is not seen, or something harmless is."""
    numbers = measured.of(dataset, kind, SEEDS)
    fitted = fit(numbers)
    judge = Bands(tuple(fitted[name] for name in used), kind.paired)
    effects = find_effects(measured, dataset, kind)
    outcomes = {fault: count_outcomes(judge, measured.of(dataset, kind, FAULT_SEEDS, fault)) for fault in effects}
    for fault in effects:
        expected = {"must": "outside", "harmless": "inside"}.get(FAULTS[fault].kind)
        if expected and outcomes[fault] != {expected: len(FAULT_SEEDS)}:
            sys.exit(f"{dataset} {kind}: {fault} must be {expected} with every seed, but is {outcomes[fault]}")
    return {
        "num_seeds": len(SEEDS),
        "first_seed": SEEDS[0],
        "numbers": {
            name: {
                "mean": float(f"{band.mean:.9g}"),
                "std": float(f"{band.std:.9g}"),
                "used": name in used,
                **({"values": [round(row[name], 6) for row in numbers]} if name in used else {}),
            }
            for name, band in fitted.items()
        },
        "leave_one_out": leave_one_out(numbers, used),
        "effects": {
            fault: {
                "moves": [round(effect, 1) if np.isfinite(effect) else None for effect in effects[fault].values()],
                "outcomes": outcomes[fault],
            }
            for fault in effects
        },
    }


def hold_out(measured: Measured, entry: dict[str, Any], kind: Kind) -> dict[str, Any]:
    """Judge the fresh seeds by what is stored; fails unless all are inside."""
    judge = Bands(
        tuple(
            Band(name, number["mean"], number["std"], entry["num_seeds"])
            for name, number in entry["numbers"].items()
            if number["used"]
        ),
        kind.paired,
    )
    runs = measured.of(entry["dataset"], kind, HOLD_OUT)
    judgements = [judge.judge([run]) for run in runs]
    for seed, judgement in zip(HOLD_OUT, judgements, strict=True):
        if judgement.outcome != "inside":
            sys.exit(f"{entry['dataset']} {kind}: seed {seed} of the hold-out is {judgement.describe()}")
    return {
        "first_seed": HOLD_OUT[0],
        "num_seeds": len(HOLD_OUT),
        "passed": sum(judgement.outcome == "inside" for judgement in judgements),
        "most_deviations": round(max(abs(found.deviations) for one in judgements for found in one.numbers), 2),
    }


def clean(seeds: Sequence[int]) -> list[Task]:
    """Trainings without a fault."""
    return [Task(dataset, precision, seed) for dataset in DATASETS for precision in PRECISIONS for seed in seeds]


def spoilt() -> list[Task]:
    """Those with each fault."""
    return [
        Task(dataset, precision, seed, fault)
        for dataset in DATASETS
        for precision in PRECISIONS
        for fault in faults_in(precision)
        for seed in FAULT_SEEDS
    ]


def describe_faults() -> dict[str, dict[str, str]]:
    """What the table of effects says about each."""
    return {name: {"text": fault.text, "stage": fault.stage, "kind": fault.kind} for name, fault in FAULTS.items()}


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", required=True, help="a Keras-layout .npz file with MNIST")
    parser.add_argument("--folder", default="runs/bands", type=Path, help="for the trainings; default: %(default)s")
    parser.add_argument("--processes", default=len(os.sched_getaffinity(0)), type=int, help="default: %(default)s")
    asked = parser.parse_args()
    start = time.monotonic()
    sources = Sources(str(Path(asked.mnist).resolve()))
    digests = {name: load_dataset(sources.config(Task(name, "float32", 0)).data).sha256 for name in DATASETS}
    recipe = recipe_keys(training_keys(asdict(sources.config(Task("digits", "float32", 0)))))
    made_with = {name: version for name, version in installed_versions().items() if name in VERSIONS}
    # Trainings of other software, data or another recipe are not mixed with these.
    key = hashlib.sha256(json.dumps([digests, recipe, made_with]).encode()).hexdigest()[:12]
    asked.folder.mkdir(parents=True, exist_ok=True)
    records = Records(asked.folder / f"trainings-{key}.jsonl")
    train_all([*clean(SEEDS), *spoilt()], records, sources, num_processes=asked.processes)
    measured = Measured(records)
    entries = []
    for kind in KINDS:
        used = choose([find_effects(measured, dataset, kind) for dataset in DATASETS])
        print(f"{kind}: {', '.join(used)}")
        entries += [
            {
                "dataset": dataset,
                "sha256": digests[dataset],
                **kind._asdict(),
                **describe(measured, dataset, kind, used=used),
            }
            for dataset in DATASETS
        ]
    # Only now: nothing above can have been chosen by them.
    train_all(clean(HOLD_OUT), records, sources, num_processes=asked.processes)
    measured = Measured(records)
    for entry in entries:
        entry["hold_out"] = hold_out(measured, entry, Kind(entry["precision"], entry["paired"]))
    stored = {
        "alpha": bands.ALPHA,
        "epochs": bands.EPOCHS,
        "versions": made_with,
        "recipe": recipe,
        "faults": describe_faults(),
        "bands": entries,
    }
    STORED.write_text(to_text(stored))
    page.PAGE.write_text(page.render(page.PAGE.read_text(), stored))
    print(f"{STORED.name}: {STORED.stat().st_size} bytes, after {(time.monotonic() - start) / 60:.0f} minutes")


def to_text(stored: dict[str, Any]) -> str:
    """JSON, with a line for each set of bands."""
    entries = ",\n".join(json.dumps(entry, separators=(",", ":"), allow_nan=False) for entry in stored["bands"])
    head = json.dumps({key: value for key, value in stored.items() if key != "bands"}, indent=1, allow_nan=False)
    return f'{head[:-2]},\n "bands": [\n{entries}\n ]\n}}\n'


if __name__ == "__main__":
    main()
