"""From the command line to a typed configuration, and from errors to exit codes.

Hydra composes the configuration; this module turns whatever Hydra, the checks and the run raise into one line and an
exit code that scripts can rely on (`base/errors.py`).
"""

import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from mnist_dist.base.console import Console
from mnist_dist.base.errors import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_LOST_PEER,
    EXIT_OK,
    EXIT_USER_ERROR,
    LostTouch,
    OfTheEnvironment,
    TrainingFailed,
    UserError,
)
from mnist_dist.base.surroundings import existing_working_directory, settle
from mnist_dist.cli.command_line import parse_command_line, printed
from mnist_dist.cli.explain import describe, out_of_memory
from mnist_dist.cli.multirun import run_grid
from mnist_dist.config.compose import Command, Config, compose, to_config
from mnist_dist.launch.environment import read_topology
from mnist_dist.launch.stop import end_at_once
from mnist_dist.launch.topology import Topology

log = logging.getLogger(__name__)

DOCTOR_HINT = "python -m mnist_dist.doctor tells more"
"""How the line of an error ends whose cause is the environment."""


def run(command: Command[Config], entry: Callable[[Config, Topology, Console], int]) -> NoReturn:
    """Call `entry` with the configuration of `command` from the command line, and exit with the code it returns."""

    def action() -> int:
        settle()
        return _run_in_console(command, entry)

    sys.exit(_guarded(action))


def _run_in_console(command: Command[Config], entry: Callable[[Config, Topology, Console], int]) -> int:
    topology = read_topology()
    with Console(rank=topology.rank, world_size=topology.world_size) as console:
        # Inside the console, so that errors reach the log, with the rank's number.
        try:
            code = _guarded(lambda: _compose_and_call(command, entry, topology, console))
        except Exception:
            console.show_held_back()
            log.exception("error: unexpected failure, please report it")
            code = EXIT_FAILURE
    if code != EXIT_OK and topology.world_size > 1:
        end_at_once(code)
    return code


def _compose_and_call(
    command: Command[Config],
    entry: Callable[[Config, Topology, Console], int],
    topology: Topology,
    console: Console,
) -> int:
    typed = parse_command_line(sys.argv[1:], command=command.name)
    if typed.is_multirun:
        return run_grid(typed, topology)
    with existing_working_directory():
        composed = compose(command, typed.overrides, config_dir=typed.config_dir, config_name=typed.config_name)
    if typed.shows is not None:
        try:
            print(printed(typed, composed, command=command.name), flush=True)
        except BrokenPipeError:  # `| head`; flushing the rest at exit must not fail either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    return entry(to_config(command, composed), topology, console)


def _guarded(action: Callable[[], int]) -> int:
    """The action's exit code, or that of the error it raised, which is printed as one line."""
    try:
        return action()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        return _report(EXIT_USER_ERROR, _with_hint(error))
    except LostTouch as error:
        return _report(EXIT_LOST_PEER, describe(error))
    except TrainingFailed as error:
        return _report(EXIT_FAILURE, _with_hint(error))
    except out_of_memory() as error:
        return _report(EXIT_FAILURE, describe(error))
    except KeyboardInterrupt as error:
        return _report(EXIT_INTERRUPTED, describe(error))


def _with_hint(error: BaseException) -> str:
    """The error in words; where the environment is the cause, with the command that looks for what is wrong."""
    return f"{describe(error)}; {DOCTOR_HINT}" if isinstance(error, OfTheEnvironment) else describe(error)


def _report(code: int, message: str) -> int:
    # Before there is a console, the standard library's handler of last resort writes this to standard error.
    log.error("error: %s", " ".join(message.splitlines()))
    return code
