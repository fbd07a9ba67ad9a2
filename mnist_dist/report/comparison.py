"""What several runs have in common and where they differ: numbers, from their records."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import yaml

from mnist_dist.config.compare import IMPLIED, flatten, job_keys
from mnist_dist.results.quantities import as_value
from mnist_dist.run.record import RunRecord

CONFIDENCE = 0.95
_ROUNDING = 1e-9
"""Accuracies are further apart than this, or equal."""


class McNemar(NamedTuple):
    """Two models on the same images."""

    only_first: int
    """Images that only the first classifies correctly."""
    only_second: int
    p: float
    """How probable a difference of at least this size is if both are equally good; exact, two-sided."""


class Group(NamedTuple):
    """Runs that differ in nothing but their seed."""

    settings: Mapping[str, str]
    """The keys by which the groups differ."""
    accuracies: tuple[float, ...]
    """On the test set, of the finished runs; one for each seed."""

    @property
    def mean(self) -> float:
        """Of the accuracies."""
        return math.fsum(self.accuracies) / len(self.accuracies)

    @property
    def half_width(self) -> float | None:
        """Half the width of the mean's 95 % confidence interval, by Student's t; None for a single run."""
        n = len(self.accuracies)
        if n < 2:
            return None
        from scipy.special import stdtrit

        variance = math.fsum((value - self.mean) ** 2 for value in self.accuracies) / (n - 1)
        return float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * math.sqrt(variance / n)


def _implied() -> dict[str, object]:
    """What runs of earlier versions did, by keys that they do not have."""
    return {key: None if text == "None" else yaml.safe_load(text) for key, text in IMPLIED.items()}


@dataclass(frozen=True)
class Comparison:
    """Several runs; the first one is what the others are compared with."""

    records: tuple[RunRecord, ...]
    names: tuple[str, ...]
    """As short as they can be told apart."""
    differing: tuple[Mapping[str, str], ...]
    """For each run the keys of its configuration that are not the same in all."""
    correct: tuple[npt.NDArray[np.bool_] | None, ...]
    """For each finished run which test images it classifies correctly, if that is known."""

    @classmethod
    def of(cls, records: Sequence[RunRecord]) -> "Comparison":
        """Compare at least one run."""
        flat = [
            {
                key: as_value(value)
                for key, value in {**_implied(), **flatten(record.config)}.items()
                if key != "run_dir"
            }
            for record in records
        ]
        correct = tuple(map(_correct, records))
        return cls(tuple(records), _names(records), tuple(_only_differing(flat)), correct)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that differ."""
        return tuple(self.differing[0])

    def identical_epochs(self, index: int) -> int | None:
        """After how many epochs the weights still were those of the first run; None if that is unknown."""
        first, other = (
            [row.weights_sha256 for row in record.history.epochs] for record in (self.records[0], self.records[index])
        )
        if not (first and other) or None in (*first, *other):
            return None
        return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, other, strict=False))))

    def mcnemar(self, index: int) -> McNemar | None:
        """Compare with the first run on the test set (McNemar 1947, exact); None without the same test images."""
        correct, also = self.correct[0], self.correct[index]
        if correct is None or also is None or not self._has_same_data(index):
            return None
        return exact_mcnemar(int((correct & ~also).sum()), int((also & ~correct).sum()))

    def _has_same_data(self, index: int) -> bool:
        first, other = self.records[0].results, self.records[index].results
        return first is not None and other is not None and first.dataset.sha256 == other.dataset.sha256

    def groups(self) -> list[Group]:
        """The finished runs, grouped by everything but the seed; the best group first."""
        found: dict[tuple[tuple[str, str], ...], dict[str, float]] = {}
        for record in self.records:
            if record.results is not None:
                keys = {**job_keys(record.config), "data": record.results.dataset.sha256[:12]}
                seed = keys.pop("seed", "")
                # The same seed again would give the same bits, and say nothing about chance.
                found.setdefault(tuple(sorted(keys.items())), {}).setdefault(seed, record.results.test.accuracy)
        settings = _only_differing([dict(keys) for keys in found])
        groups = [
            Group(one, tuple(accuracies.values())) for one, accuracies in zip(settings, found.values(), strict=True)
        ]
        return sorted(groups, key=lambda group: -group.mean)

    def worse(self, tolerance: float) -> list[str]:
        """In words, which runs are worse than the first by more than `tolerance` of test accuracy, or have none."""
        accuracies = [record.results.test.accuracy if record.results else None for record in self.records]
        problems = []
        for index, (name, accuracy) in enumerate(zip(self.names, accuracies, strict=True)):
            if accuracy is None:
                problems.append(f"{name} has no result ({self.records[index].state})")
            elif accuracies[0] is None:
                continue
            elif not self._has_same_data(index):
                problems.append(f"{name} has other data than {self.names[0]}")
            elif accuracies[0] - accuracy > tolerance + _ROUNDING:
                test = self.mcnemar(index)
                chance = f", McNemar's p = {test.p:.2g}" if test else ""
                drop = 100 * (accuracies[0] - accuracy)
                problems.append(
                    f"{name} has a test accuracy of {100 * accuracy:.2f} %, {drop:.2f} below {self.names[0]}{chance}"
                )
        return problems


def _correct(record: RunRecord) -> npt.NDArray[np.bool_] | None:
    """Which test images a finished run classifies correctly, if that is known."""
    if record.results is None:
        return None
    try:
        predictions = record.load_predictions()
    except ValueError:
        return None
    return predictions.splits["test"].correct if predictions else None


def exact_mcnemar(only_first: int, only_second: int) -> McNemar:
    """McNemar's test by the binomial distribution, for the numbers of images that only one model has right."""
    from scipy.special import bdtr

    discordant = only_first + only_second
    p = min(1.0, 2 * float(bdtr(min(only_first, only_second), discordant, 0.5))) if discordant else 1.0
    return McNemar(only_first, only_second, p)


def _only_differing(flat: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The keys that are not the same in all; a dash for those that a configuration does not have."""
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [{key: one.get(key, "\N{EN DASH}") for key in keys} for one in flat]
    differing = [key for key in keys if len({row[key] for row in rows}) > 1]
    return [{key: row[key] for key in differing} for row in rows]


def _names(records: Sequence[RunRecord]) -> tuple[str, ...]:
    """The last parts of the paths: as many as it takes to tell all apart."""
    paths = [record.path.absolute() for record in records]
    for count in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(map(str, paths))  # the same folder twice
