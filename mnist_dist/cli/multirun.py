"""`python -m mnist_dist.train --multirun KEY=A,B ...`: each point of a grid in a process of its own, one by one."""

import itertools
import logging
import subprocess
from collections.abc import Sequence
from pathlib import Path
from signal import Signals as SignalNumber

from mnist_dist.base.errors import EXIT_OK, UserError
from mnist_dist.base.files import expand_path, make_new_folder, path_by_time
from mnist_dist.cli.command_line import CommandLine, check_override, parse_override, train_words
from mnist_dist.config.compose import TRAIN, compose, to_config
from mnist_dist.config.rules import shorten
from mnist_dist.config.search_space import Interval, parse_dimension
from mnist_dist.launch.child import Signals, exit_code_of, start_child
from mnist_dist.launch.topology import Topology

log = logging.getLogger(__name__)

_MAX_POINTS = 10_000


def run_grid(typed: CommandLine, topology: Topology) -> int:
    """Train every point, each below the run folder; returns the first exit code that is not 0.

    A signal is passed on to the training of the moment, and no other follows; the same command continues.

    Raises:
        UserError, hydra.errors.HydraException, omegaconf.errors.OmegaConfBaseException: a point cannot be trained; none
            has been started.
    """
    if topology.world_size > 1:
        raise UserError(
            f"--multirun: {topology.world_size} processes were started, each would train the whole grid; start one, or "
            "give the command once for each value"
        )
    points = expand(typed.overrides)
    configs = []
    for point in points:
        for text in point:
            check_override(text)
        composed = compose(TRAIN, point, config_dir=typed.config_dir, config_name=typed.config_name)
        configs.append(to_config(TRAIN, composed))
    folder, first_failure = _folder(configs[0].run_dir), EXIT_OK
    with Signals() as signals:
        for number, point in enumerate(points):
            varied = " ".join(text for text in point if text not in typed.overrides)
            log.info("Run %d of %d, %s: %s", number + 1, len(points), folder / str(number), varied)
            words = train_words(folder / str(number), point, config_dir=typed.config_dir, config_name=typed.config_name)
            code, stopped_by = _train(words, signals)
            if stopped_by is not None:
                log.info("%s: stopped; run the same command again to continue", stopped_by.name)
                return exit_code_of(stopped_by)
            if code != EXIT_OK:
                log.warning("Run %d of %d: exit code %d", number + 1, len(points), code)
            first_failure = first_failure or code
    return first_failure


def expand(overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """Every combination of the values given, the last key's changing fastest; raises UserError for what has no end."""
    options: list[list[str]] = []
    size = 1
    for text in overrides:
        override = parse_override(text)
        if not override.is_sweep_override():
            options.append([text])
            continue
        key, _, values = text.partition("=")
        if key == "run_dir":
            raise UserError(f"{shorten(text)}: give one folder; the runs are numbered below it")
        try:
            dimension = parse_dimension(key, values)
        except ValueError as error:
            raise UserError(f"{shorten(text)}: {error}") from error
        if isinstance(dimension, Interval):
            raise UserError(
                f"{shorten(text)}: has no end of values, so --multirun cannot train them all; give single values, or "
                "let python -m mnist_dist.sweep search"
            )
        options.append([f"{key}={value}" for value in dimension.texts])
        size *= len(dimension.texts)
    if size > _MAX_POINTS:
        raise UserError(f"--multirun: these are {size} runs, more than {_MAX_POINTS}; give fewer values")
    return list(itertools.product(*options))


def _folder(run_dir: str | None) -> Path:
    if run_dir is None:
        return make_new_folder(path_by_time())
    folder = expand_path("run_dir", run_dir)
    if (folder / "config.yaml").is_file():
        raise UserError(f"run_dir={folder}: holds a single run; name another folder for the runs of --multirun")
    return folder


def _train(words: Sequence[str], signals: Signals) -> tuple[int, SignalNumber | None]:
    """Train to the end; returns the exit code as a shell reports it, and the signal that this process got."""
    process: subprocess.Popen[bytes] = start_child(words)
    stopped_by: SignalNumber | None = None
    while process.poll() is None:
        for number in signals.wait():
            stopped_by = stopped_by or number
            process.send_signal(number)
    code = process.returncode
    return (128 - code if code < 0 else code), stopped_by
