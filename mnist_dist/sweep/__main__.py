"""Search for good values: `python -m mnist_dist.sweep KEY=VALUE ...`, with the keys of `train` for all trials."""

import logging
import sys
from dataclasses import replace

from mnist_dist.base.console import Console
from mnist_dist.base.errors import EXIT_FAILURE, EXIT_OK, EnvironmentFailed, EnvironmentProblem, UserError
from mnist_dist.base.files import describe_os_error, expand_path, write_atomically
from mnist_dist.cli.command_line import parse_command_line
from mnist_dist.cli.explain import describe
from mnist_dist.cli.main import run
from mnist_dist.launch.child import Signals, Stopped, exit_code_of
from mnist_dist.launch.topology import Topology
from mnist_dist.run.folder import REPORT_PAGE, RunFolder
from mnist_dist.run.sweep_folder import LOOK_S, Sweep, SweepFolder, is_sweep_folder, read_sweep
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
    folder = find_folder(config)
    again = "run the same command again" + ("" if config.sweep_dir else f" with sweep_dir={folder.path}")
    try:
        with Signals() as signals:
            search = open_sweep(folder, search, signals)
            if was_over := is_over(folder, search):
                log.info("%s holds this sweep, finished: nothing to do", folder.path)
            else:
                log.info("Sweep: %s, %d trials", folder.path, search.plan.num_trials)
                own_shares = shares(config.jobs, visible_gpus=topology.visible_gpus)
                Worker(folder, search, own_shares, signals).run()
            if config.report and not (was_over and (folder.path / REPORT_PAGE).is_file()):
                write_report(folder)
            return conclude(read_sweep(folder.path))
    except Stopped as stopped:
        log.info("%s: stopped; %s to continue", stopped.number.name, again)
        return exit_code_of(stopped.number)
    except OSError as error:
        place = error.filename or folder.path
        raise EnvironmentFailed(f"{place}: {describe_os_error(error)}; fix this and {again}") from error


def find_folder(config: SweepConfig) -> SweepFolder:
    """The configured folder, or a new one; raises UserError if it holds something else, or cannot be made."""
    if config.sweep_dir is None:
        new = RunFolder.from_config(None)
        try:
            new.reserve()
        except OSError as error:
            raise EnvironmentProblem(
                f"{error.filename}: {describe_os_error(error)}; give sweep_dir=FOLDER in another place"
            ) from error
        return SweepFolder(new.path)
    folder = SweepFolder(expand_path("sweep_dir", config.sweep_dir))
    folder.check_usable()
    return folder


def open_sweep(folder: SweepFolder, search: Search, signals: Signals) -> Search:
    """Write the plan, or compare it with that in the folder; the search with the names of that plan in their order.

    Raises:
        UserError: the folder holds something else, or cannot be used.
        Stopped: a signal has come.
    """
    with folder.locked(wait=lambda _: signals.sleep(LOOK_S), may_be_new=True):
        folder.tidy()
        found = folder.read_plan() if is_sweep_folder(folder.path) else None
        if found is not None:
            check_same(found, search.plan, path=folder.path)
            # Optuna draws the values in this order, which should not depend on how the file was sorted last.
            plan = replace(search.plan, space=found.space)
            search = Search(plan, {key: search.space[key] for key in found.space})
        if found is None or search.plan.num_trials > found.num_trials:
            folder.write_plan(search.plan)
        folder.make_trials()
    return search


def is_over(folder: SweepFolder, search: Search) -> bool:
    """Whether all trials that are asked for are done, and noted to be."""
    trials = folder.read_records()
    return len(trials) >= search.plan.num_trials and all(
        trial.is_final and folder.as_it_is(search.plan, trial) == trial for trial in trials
    )


def write_report(folder: SweepFolder) -> None:
    """Write `report.html` of the sweep, as every worker does that sees the last trial end, with the same content.

    What is wrong with a report must not fail a sweep.
    """
    path = folder.path / REPORT_PAGE
    try:
        from mnist_dist.report.sweep_page import build_sweep_page

        path.unlink(missing_ok=True)  # it may be of an earlier moment; without it, the same command makes it again
        write_atomically(path, build_sweep_page(read_sweep(folder.path), output=path).encode())
        log.info("Report: %s", path)
    except Exception as error:
        log.warning("%s was not written: %s", REPORT_PAGE, describe(error))


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
