"""The page of a verification: what it says, that it stands alone, and that nothing in a report can break it."""

import random
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from xml.etree import ElementTree

import matplotlib
import pytest

from mnist_dist.results.page import printable, text
from mnist_dist.results.png import TRAIN_COLOR
from mnist_dist.results.svg import create_page_figure, to_svg
from mnist_dist.verify.page import build_page
from mnist_dist.verify.quantities import bytes_text, digits, seconds_text
from mnist_dist.verify.report import CheckResult, RankFacts, Report, Suspect, judge

NAMES = (
    "environment detectors identity collectives data cross_examination exact fast learning precision interruption "
    "slow_rank scaling reference"
).split()
HOSTILE = "</title></style><script>alert('a')</script>\"&amp;\x00\x1b[31m\ud800\u202e$x_{$"


def create_transfers(replicas: int) -> list[dict]:
    transfers = []
    for collective, factor in (("all_reduce", 1.0), ("all_gather", 1.4), ("broadcast", 1.9)):
        for num_bytes in (4 * 4**i for i in range(12)):
            seconds = (38e-6 + num_bytes / 2.1e9) * (1 + 0.1 * random.random()) / factor
            moved = num_bytes / seconds / 1e9 * (2 * (replicas - 1) / replicas)
            transfers.append({"collective": collective, "bytes": num_bytes, "seconds": seconds, "bus_gb_per_s": moved})
    return transfers


def create_numbers(precision: str) -> list[dict]:
    numbers = []
    for name, mean, width in (
        ("log loss, epoch 1", -0.3437, 0.0081),
        ("log loss, epoch 2", -1.0942, 0.0123),
        ("log loss, epoch 3", -1.3318, 0.0141),
        ("log validation loss", -1.7841, 0.0312),
        ("logit validation accuracy", 2.8812, 0.0402),
    ):
        deviations = random.uniform(-2.5, 2.5)
        name = name if precision == "float32" else f"{name}, paired"
        values = {"mean": mean, "low": mean - 4.1 * width, "high": mean + 4.1 * width}
        numbers.append({"name": name, "value": mean + deviations * width, **values, "deviations": deviations})
    return numbers


def create_details(replicas: int) -> dict[str, dict]:
    losses = [2.31 * 0.9**i + 0.02 * random.random() for i in range(25)]
    per_rank = [49500 // replicas + (rank < 49500 % replicas) for rank in range(replicas)]
    shards = [f"{shard:064x}" for shard in range(8)]
    rounds = [[[0.0412 + 0.003 * random.random() for _ in range(6)] for _ in range(replicas)] for _ in range(2)]
    counts = sorted({1, 2, replicas // 2 or 1, replicas})
    points = [
        {"kind": kind, "replicas": n, "images_per_s": 12000 * n * loss**n, "efficiency": loss**n / loss}
        for kind, loss in (("strong", 0.95 ** (2 / replicas)), ("weak", 0.98 ** (2 / replicas)))
        for n in counts
    ]
    return {
        "detectors": {"faults_put_in": 13, "faults_caught": 13},
        "collectives": {"transfers": create_transfers(replicas)},
        "data": {"examples": 49500, "exactly_once": 49500, "per_rank": per_rank},
        "cross_examination": {"shards": 8, "digests": [shards] * replicas, "repeats_equal": [True] * replicas},
        "exact": {
            "runs": [
                {"optimizer": name, "losses": losses, "reference_losses": losses, "first_difference": None}
                for name in ("sgd", "adam")
            ]
        },
        "fast": {"distance": 3.1e-6, "noise": [2e-6 + 2e-6 * random.random() for _ in range(8)], "limit": 2.4e-5},
        "learning": {
            "numbers": create_numbers("float32"),
            "history": [
                {"epoch": i, "loss": 0.7 / i, "val_loss": 0.3 / i, "val_accuracy": 0.9 + 0.02 * i} for i in (1, 2, 3)
            ],
        },
        "precision": {
            "numbers": create_numbers("mixed"),
            "overflow": {"skipped_on": [True] * replicas, "scale_before": 32768.0, "scale_after": 16384.0},
        },
        "interruption": {"write_s": 0.0312, "read_s": 0.0094, "bytes": 4_912_000},
        "slow_rank": {"rounds": rounds, "slowest_ratio": 1.04, "limit": 1.33},
        "scaling": {"points": points, "compute_s": 0.0412, "communication_s": 0.0061},
        "reference": {"compared": [], "not_comparable": "no reference was given"},
    }


SUMMARIES = {
    "environment": "All ranks run the same code, packages and configuration; no warning.",
    "detectors": "13 faults were put in, and all 13 were caught with the right rank.",
    "identity": "Configuration, code, data, initial weights and slots are the same on all ranks.",
    "collectives": "Every element of 36 transfers is exact.",
    "data": "Each of 49,500 examples is seen exactly once, with its label.",
    "cross_examination": "All replicas compute the same gradients, and the same when asked twice.",
    "exact": "25 steps of SGD and of Adam equal those of one replica, bit by bit.",
    "fast": "The weights are as near to those of one replica as rounding allows.",
    "learning": "5 of 5 numbers of 3 epochs are inside the band.",
    "precision": "5 of 5 numbers are inside the paired band; an overflow skips the step on all replicas.",
    "interruption": "A checkpoint is read back to the same bits; a flipped byte and a truncation are refused.",
    "slow_rank": "The slowest replica takes 1.04 times as long as the fastest; the limit is 1.33.",
    "scaling": "2 replicas are 1.83 times as fast as one: an efficiency of 91 %.",
    "reference": "Not asked for: reference=FILE compares with an earlier verify.json.",
}
SECONDS = (1.8, 4.2, 0.3, 6.1, 5.2, 9.8, 14.1, 8.7, 31.5, 19.9, 3.3, 9.2, 11.8, 0.0)


def create_report(replicas: int = 2, *, statuses: dict[str, str] | None = None, **changes) -> Report:
    random.seed(7)
    details = create_details(replicas)
    status_of = dict.fromkeys(NAMES, "pass") | {"scaling": "info", "reference": "skipped"} | (statuses or {})
    checks = tuple(
        CheckResult(i, name, status_of[name], SUMMARIES[name], SECONDS[i], details=details.get(name, {}))
        for i, name in enumerate(NAMES)
    )
    ranks = tuple(
        RankFacts(
            rank,
            f"node{rank // 8 + 1:03d}",
            (f"GPU:{rank % 8}",),
            (f"GPU-5b1e77c2-90{rank:03d}-4c6e-b1f7-0d93f2a6c81e",),
            "AMD EPYC 9654 96-Core Processor",
            24,
        )
        for rank in range(replicas)
    )
    report = Report(
        verdict=judge(checks),
        started="2026-03-02T14:05:12.482133+01:00",
        seconds=118.4,
        command="python -m mnist_dist.verify data.path=/shared/mnist.npz strategy=horovod",
        strategy="horovod",
        num_replicas=replicas,
        dataset={
            "name": "mnist",
            "sha256": "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1",
            "num_train": 49500,
        },
        configuration={
            "data": {"path": "/shared/mnist.npz", "validation_fraction": 0.1},
            "model": {"name": "mlp", "hidden": [512, 512], "dropout": 0.2},
            "optimizer": {"name": "adam", "learning_rate": 0.001},
            "trainer": {"epochs": 3, "batch_size": 128, "precision": "float32", "reproducibility": "exact", "seed": 0},
            "strategy": "horovod",
            "resume": True,
            "plots": {"reference": None},
        },
        versions={
            "mnist_dist": "0.5.0",
            "python": "3.11.7",
            "tensorflow": "2.21.0",
            "keras": "3.15.0",
            "numpy": "2.3.1",
            "horovod": "0.28.1",
        },
        ranks=ranks,
        checks=checks,
    )
    return replace(report, **changes)


def change_check(report: Report, name: str, **changes) -> Report:
    checks = tuple(replace(check, **changes) if check.name == name else check for check in report.checks)
    return replace(report, checks=checks, verdict=judge(checks))
