"""The metrics of every epoch, as a value."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

Metric = Literal["loss", "accuracy"]
"""A quantity with a training and a validation curve."""


@dataclass(frozen=True)
class EpochMetrics:
    """One row of `history.csv`. `loss` and `accuracy` are the training ones, while the weights move."""

    epoch: int
    """Counted from 1."""
    loss: float
    accuracy: float
    val_loss: float
    val_accuracy: float
    learning_rate: float
    epoch_s: float
    """Seconds of training and validation."""
    images_per_s: float
    """Training images per second of the epoch's training part."""
    weights_sha256: str | None = None
    """Digest of the weights after the epoch (`sums.weights_digest`); a column with reproducibility=exact only."""

    def describe(self, num_epochs: int) -> str:
        """A line in Keras' format, for a run of so many epochs."""
        return (
            f"Epoch {self.epoch}/{num_epochs} - {self.epoch_s:.1f}s - loss: {self.loss:.4f} - accuracy: "
            f"{self.accuracy:.4f} - val_loss: {self.val_loss:.4f} - val_accuracy: {self.val_accuracy:.4f}"
        )


COLUMNS = tuple(field.name for field in fields(EpochMetrics))


@dataclass(frozen=True)
class History:
    """All finished epochs, in order and without a gap."""

    epochs: tuple[EpochMetrics, ...] = ()

    def __post_init__(self) -> None:
        numbers = [row.epoch for row in self.epochs]
        if numbers != list(range(1, len(numbers) + 1)):
            raise ValueError(f"epochs must count 1, 2, 3, ... without a gap; got {numbers}")

    def append(self, row: EpochMetrics) -> "History":
        """A history with one more epoch; raises ValueError unless it is the next one."""
        return History((*self.epochs, row))

    def column(self, name: str) -> list[float]:
        """One column over all epochs."""
        return [getattr(row, name) for row in self.epochs]

    @property
    def best(self) -> EpochMetrics:
        """The epoch of the highest validation accuracy; the earliest of equals."""
        return best_of(self.epochs)


def best_of(rows: Iterable[EpochMetrics]) -> EpochMetrics:
    """The row of the highest validation accuracy; the earliest of equals; raises ValueError for no rows."""
    return max(rows, key=lambda row: (row.val_accuracy, -row.epoch))


def steep_epochs(num_epochs: float) -> float:
    """How many first epochs rise so much that, shown in full, they would flatten all others into one line.

    Longer runs have more of them, but not in proportion: none of fewer than 9 epochs, 1 of 20, 4 of 150, 18 of 3000.
    """
    return math.sqrt(num_epochs) / 3


def to_csv(history: History) -> str:
    """The history as CSV text with a header; floats are written so that they read back to the same bits."""
    columns = COLUMNS if any(row.weights_sha256 for row in history.epochs) else COLUMNS[:-1]
    lines = [",".join(columns)]
    lines += [",".join(_to_text(getattr(row, name)) for name in columns) for row in history.epochs]
    return "\n".join(lines) + "\n"


def from_csv(text: str) -> History:
    """Read what `to_csv` wrote; raises ValueError where the text is not such a table."""
    header, *lines = text.splitlines() or [""]
    columns = tuple(header.split(","))
    if columns not in (COLUMNS, COLUMNS[:-1]):
        raise ValueError(f"expected the columns {','.join(COLUMNS)}, the last one at will; got {header}")
    return History(tuple(_parse_row(line.split(","), columns) for line in lines))


def _to_text(value: float | str) -> str:
    return value if isinstance(value, str) else repr(value)


def _parse_row(values: Sequence[str], columns: Sequence[str]) -> EpochMetrics:
    if len(values) != len(columns):
        raise ValueError(f"expected {len(columns)} values; got {','.join(values)}")
    named = dict(zip(columns, values, strict=True))
    epoch, digest = int(named.pop("epoch")), named.pop("weights_sha256", None)
    return EpochMetrics(epoch, weights_sha256=digest, **{name: float(value) for name, value in named.items()})
