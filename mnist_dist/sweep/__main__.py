"""Search for good values: `python -m mnist_dist.sweep KEY=VALUE ...`, with the keys of `train` for all trials."""

import logging
import sys
from dataclasses import replace

from mnist_dist.base.console import Console
from mnist_dist.base.errors import EXIT_FAILURE, EXIT_OK, EnvironmentFailed, UserError
from mnist_dist.base.files import describe_os_error, expand_path, write_atomically
from mnist_dist.cli.command_line import parse_command_line
from mnist_dist.cli.main import run
from mnist_dist.launch.child import Signals
from mnist_dist.launch.topology import Topology
from mnist_dist.run.folder import REPORT_PAGE, RunFolder
from mnist_dist.run.sweep_folder import Sweep, SweepFolder, is_sweep_folder, read_sweep
from mnist_dist.sweep.config import SWEEP, SweepConfig
from mnist_dist.sweep.plan import Search, build_search, check_same
from mnist_dist.sweep.training import shares

log = logging.getLogger("mnist_dist.sweep")  # __name__ is __main__ when run with -m


def sweep(config: SweepConfig, topology: Topology, console: Console) -> int:
    """Work on a sweep until it is done; returns the exit code, 1 if every trial has failed."""
    if topology.world_size > 1:
        raise UserError(
            f"{topology.world_size} processes: a sweep is started by one process on each machine, and starts the "
            "trainings itself; leave out the launcher, and give jobs=N for several trainings at once"
        )
    try:
        from mnist_dist.sweep.worker import Worker
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise UserError("optuna is not installed, which searches: pip install 'mnist-dist[sweep]'") from error
    search = build_search(config, parse_command_line(sys.argv[1:], command=SWEEP.name))
    try:
        with Signals() as signals:
            folder, search = open_sweep(config, search)
            if is_over(folder, search):
                log.info("%s holds this sweep, finished: nothing to do", folder.path)
            else:
                log.info("Sweep: %s, %d trials", folder.path, search.plan.num_trials)
                own_shares = shares(config.jobs, visible_gpus=topology.visible_gpus)
                if code := Worker(folder, search, own_shares, signals).run():
                    return code
                (folder.path / REPORT_PAGE).unlink(missing_ok=True)  # it may be of an earlier moment
            if config.report and not (folder.path / REPORT_PAGE).is_file():
                write_report(folder)
            return conclude(read_sweep(folder.path))
    except OSError as error:
        place = error.filename or config.sweep_dir
        raise EnvironmentFailed(
            f"{place}: {describe_os_error(error)}; fix this and run the same command again"
        ) from error


def open_sweep(config: SweepConfig, search: Search) -> tuple[SweepFolder, Search]:
    """The folder, new or with this sweep, and the search with the names of the folder's plan in their order.

    Raises:
        UserError: it holds something else, or cannot be used.
    """
    if config.sweep_dir is None:
        new = RunFolder.from_config(None)
        new.reserve()
        folder = SweepFolder(new.path)
    else:
        folder = SweepFolder(expand_path("sweep_dir", config.sweep_dir))
    folder.check_usable()
    with folder.locked():
        folder.tidy()
        if not is_sweep_folder(folder.path):
            folder.write_plan(search.plan)
            return folder, search
        found = folder.read_plan()
        check_same(found, search.plan, path=folder.path)
        # Optuna draws the values in this order, which should not depend on how the file was sorted last.
        plan = replace(search.plan, space=found.space)
        if plan.num_trials > found.num_trials:
            folder.write_plan(plan)
    return folder, replace(search, plan=plan, space={key: search.space[key] for key in found.space})


def is_over(folder: SweepFolder, search: Search) -> bool:
    """Whether all trials that are asked for are done, and noted to be."""
    trials = folder.read_records()
    return len(trials) >= search.plan.num_trials and all(
        trial.is_final and folder.as_it_is(search.plan, trial) == trial for trial in trials
    )


def write_report(folder: SweepFolder) -> None:
    """Write `report.html` of the sweep; every worker that sees the last trial end does, with the same content."""
    from mnist_dist.report.sweep_page import build_sweep_page

    path = folder.path / REPORT_PAGE
    write_atomically(path, build_sweep_page(read_sweep(folder.path), output=path).encode())
    log.info("Report: %s", path)


def conclude(found: Sweep) -> int:
    """Log what a sweep that is done has found; returns the exit code."""
    counts = {state: sum(trial.state == state for trial in found.trials) for state in ("finished", "pruned", "failed")}
    log.info(
        "%s: %d trials are done: %s",
        *(found.path, len(found.trials), ", ".join(f"{count} {state}" for state, count in counts.items() if count)),
    )
    best = found.best
    if best is not None:
        log.info("Best: trial %d, validation accuracy %.4f: %s", best.number, best.value, " ".join(best.overrides))
        log.info("Its run folder: %s", found.run_dir(best))
    return EXIT_FAILURE if counts["failed"] == len(found.trials) else EXIT_OK


def main() -> None:
    """The console script."""
    run(SWEEP, sweep)


if __name__ == "__main__":
    main()
