"""From a folder to its page."""

from pathlib import Path

from mnist_dist.results.page import build_document, headline, text
from mnist_dist.run.record import read_record


def build_run_report(path: Path, *, is_alive: bool | None = None) -> str:
    """The page of the run in the folder `path`."""
    record = read_record(path, is_alive=is_alive)
    header = headline(record.state, "", tone="info", label=str(path), sentence=text(record.reason))
    return build_document(str(path), header=header, sections=[], footer=text(""))
