"""The curves of an earlier run to compare with: the original run, which comes with the package, or the user's."""

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path

from mnist_dist.base.errors import UserError
from mnist_dist.base.files import read_regular

ORIGINAL = "original"
"""What `plots.reference` calls the original run."""
_EARLIER_NAME = "seed"  # still understood

REFERENCE_COLUMNS = ("epoch", "loss", "accuracy", "val_loss", "val_accuracy")


@dataclass(frozen=True)
class Reference:
    """The curves of an earlier run, to compare with."""

    name: str
    """What the legend calls it."""
    columns: Mapping[str, tuple[float, ...]]
    """One column for each of `REFERENCE_COLUMNS`, all of the same length; epochs count from 1."""


def load_reference(name: str | None) -> Reference | None:
    """The curves that `plots.reference` asks for.

    Args:
        name: None for no reference, `original` for the original run (it comes with the package), else the path
            of a CSV file with at least the columns of `REFERENCE_COLUMNS`; the `history.csv` of any run will do.

    Raises:
        UserError: The file cannot be read, or is not such a table.
    """
    if name is None:
        return None
    if name in (ORIGINAL, _EARLIER_NAME):
        text = resources.files("mnist_dist.results").joinpath("original_history.csv").read_text("utf-8")
        return Reference("original run", _parse_reference(text))
    try:
        # "utf-8-sig": spreadsheet programs put a byte-order mark before the first column's name.
        columns = _parse_reference(read_regular(Path(name)).decode("utf-8-sig"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise _reference_error(name, f"cannot be read ({reason}); check the path") from error
    except UnicodeDecodeError as error:
        raise _reference_error(name, "is not a text file; give a CSV file") from error
    except (ValueError, csv.Error) as error:
        raise _reference_error(name, str(error)) from error
    # Every run calls its file history.csv, so the folder's name is what tells two of them apart.
    return Reference("/".join(Path(name).parts[-2:]), columns)


def _reference_error(name: str, problem: str) -> UserError:
    return UserError(f"plots.reference={name} {problem}, or use plots.reference={ORIGINAL} or plots.reference=null")


def _parse_reference(text: str) -> dict[str, tuple[float, ...]]:
    """Columns of a CSV text; raises ValueError that says what is wrong and what to do."""
    # strict=True: a forgotten closing quote is an error, not a field that swallows the rest of the file.
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True, strict=True)
    header = [name.strip() for name in reader.fieldnames or ()]
    if not header:
        raise ValueError("is empty; give a CSV file with a header and a row per epoch")
    missing = [name for name in REFERENCE_COLUMNS if name not in header]
    if missing:
        raise ValueError(f"has no column {', '.join(missing)}; it needs {','.join(REFERENCE_COLUMNS)}")
    reader.fieldnames = header
    rows = [[_parse_cell(row[name], name, reader.line_num) for name in REFERENCE_COLUMNS] for row in reader]
    if not rows:
        raise ValueError("has a header but no epochs; give a CSV file with a row per epoch")
    columns = {name: tuple(row[i] for row in rows) for i, name in enumerate(REFERENCE_COLUMNS)}
    epochs = columns["epoch"]
    if epochs[0] < 1 or any(later <= earlier for earlier, later in pairwise(epochs)):
        raise ValueError("has epochs that do not count upwards from 1 or later; renumber its column epoch")
    return columns


def _parse_cell(cell: str | None, column: str, line: int) -> float:
    try:
        value = float(cell or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"line {line} has {column}={cell!r}; write a number there")
    if column.endswith("accuracy") and not 0 <= value <= 1:
        raise ValueError(f"line {line} has {column}={cell}; write accuracies as fractions from 0 to 1")
    return value
