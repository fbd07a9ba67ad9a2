"""Pages about runs: `python -m mnist_dist.report run_dir=runs/...`."""

import logging
import re
from pathlib import Path

from mnist_dist.base.console import Console
from mnist_dist.base.errors import EXIT_FAILURE, EXIT_OK, EnvironmentProblem, UserError
from mnist_dist.base.files import describe_os_error, expand_path, write_atomically
from mnist_dist.cli.main import run
from mnist_dist.config.compose import Command
from mnist_dist.launch.topology import Topology
from mnist_dist.report.comparison import Comparison
from mnist_dist.report.config import ReportConfig
from mnist_dist.run.folder import REPORT_PAGE
from mnist_dist.run.record import is_run_folder, read_record
from mnist_dist.run.sweep_folder import read_sweep

log = logging.getLogger("mnist_dist.report")  # __name__ is __main__ when run with -m

REPORT = Command("report", ReportConfig)


def report(config: ReportConfig, topology: Topology, console: Console) -> int:
    """Write the page of a run, or of several; returns the exit code, 1 if one is worse than it may be."""
    if topology.world_size > 1:
        raise UserError(f"{topology.world_size} processes were started; a report needs one")
    if config.sweep_dir is not None:
        return _report_sweep(expand_path("sweep_dir", config.sweep_dir), config.output)
    folders = [expand_path("run_dir", name) for name in config.run_dirs]
    if len(folders) == 1 and is_run_folder(folders[0]) and config.fail_if_worse is None:
        return _report_run(folders[0], config.output)
    return _report_comparison(folders, config)


def _report_run(folder: Path, output: str | None) -> int:
    from mnist_dist.report.run_page import build_run_page

    record = read_record(folder)
    _write(build_run_page(record), _output(output, folder / REPORT_PAGE))
    return EXIT_OK


def _report_sweep(folder: Path, output: str | None) -> int:
    from mnist_dist.report.sweep_page import build_sweep_page

    path = _output(output, folder / REPORT_PAGE)
    _write(build_sweep_page(read_sweep(folder), output=path), path)
    return EXIT_OK


def _report_comparison(folders: list[Path], config: ReportConfig) -> int:
    from mnist_dist.report.comparison_page import build_comparison_page

    if len(folders) == 1:
        output = _output(config.output, folders[0] / REPORT_PAGE)
        folders = _runs_below(folders[0])
    else:
        output = _output(config.output, Path("comparison.html"))
    comparison = Comparison.of([read_record(folder) for folder in folders])
    _write(build_comparison_page(comparison, output=output), output)
    if config.fail_if_worse is not None and (problems := comparison.worse(config.fail_if_worse)):
        for problem in problems:
            log.error("worse: %s", problem)
        return EXIT_FAILURE
    return EXIT_OK


def _runs_below(folder: Path) -> list[Path]:
    """The run folders in `folder`, by name; raises UserError if there is none."""
    try:
        paths = sorted(folder.iterdir(), key=lambda path: _natural(path.name))
        found = [path for path in paths if path.is_dir() and is_run_folder(path)]
    except OSError as error:
        raise UserError(f"run_dir={folder}: cannot be read: {describe_os_error(error)}") from error
    if not found:
        raise UserError(f"run_dir={folder}: no run here, nor in the folders below it; name the folder of a run")
    return found


def _natural(name: str) -> list[tuple[str, int]]:
    """A key to sort by: 2 before 10."""
    return [(text, int(number or 0)) for text, number in re.findall("([^0-9]*)([0-9]*)", name)]


def _output(name: str | None, default: Path) -> Path:
    return default if name is None else expand_path("output", name)


def _write(page: str, path: Path) -> None:
    try:
        write_atomically(path, page.encode())
    except OSError as error:
        raise EnvironmentProblem(f"output={path}: cannot be written: {describe_os_error(error)}") from error
    log.info("Report: %s", path)


def main() -> None:
    """The console script."""
    run(REPORT, report)


if __name__ == "__main__":
    main()
