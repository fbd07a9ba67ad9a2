"""The metrics of every epoch, as a value."""

from collections.abc import Sequence
from dataclasses import dataclass, fields


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
        return max(self.epochs, key=lambda row: (row.val_accuracy, -row.epoch))


def to_csv(history: History) -> str:
    """The history as CSV text with a header; floats are written so that they read back to the same bits."""
    lines = [",".join(COLUMNS)]
    lines += [",".join(repr(getattr(row, name)) for name in COLUMNS) for row in history.epochs]
    return "\n".join(lines) + "\n"


def from_csv(text: str) -> History:
    """Read what `to_csv` wrote; raises ValueError where the text is not such a table."""
    header, *lines = text.splitlines() or [""]
    if tuple(header.split(",")) != COLUMNS:
        raise ValueError(f"expected the columns {','.join(COLUMNS)}; got {header}")
    return History(tuple(_parse_row(line.split(",")) for line in lines))


def _parse_row(values: Sequence[str]) -> EpochMetrics:
    if len(values) != len(COLUMNS):
        raise ValueError(f"expected {len(COLUMNS)} values; got {','.join(values)}")
    return EpochMetrics(int(values[0]), *(float(value) for value in values[1:]))
