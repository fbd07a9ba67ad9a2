"""Train in several processes without a batch system: `python -m mnist_dist.launch -np 4 train KEY=VALUE ...`."""

import argparse
import itertools
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mnist_dist.base.console import Console
from mnist_dist.base.errors import EXIT_USER_ERROR, UserError
from mnist_dist.base.files import expand_path, path_by_time
from mnist_dist.base.surroundings import settle
from mnist_dist.launch.child import Signals
from mnist_dist.launch.environment import read_topology
from mnist_dist.launch.hosts import LOCALHOST, format_hosts, parse_hosts
from mnist_dist.launch.ssh import Ssh
from mnist_dist.launch.supervisor import Plan, Supervisor
from mnist_dist.launch.topology import Alone
from mnist_dist.launch.variables import MAX_PROCESSES

log = logging.getLogger("mnist_dist.launch")

TRAIN = "train"
_COMMANDS = (TRAIN, "verify", "doctor")
"""Those that run in several processes; only a training resumes."""
# The others of a training name a lost one within seconds; rank 0 of the other commands has a table or verdict to write.
_LEAVE_S, _CONCLUDE_S = 8.0, 90.0  # one that fails leaves the others 5 s


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; all options: --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m mnist_dist.launch",
        description="Start the processes of a job here and, by ssh, on other hosts. When a process or host is lost, "
        "the training goes on with what is left, to the same weights.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-np", metavar="N", type=int, help="how many processes at most; by default as many as -H has slots")
    add(
        "-H", metavar="HOST:SLOTS,...", dest="hosts", help="where, and how many on each; by default all on this machine"
    )
    add("--min-np", metavar="M", type=int, default=1, help="with fewer left after a loss, the job ends (default: 1)")
    add("--ssh", metavar="COMMAND", default="ssh", help='with options of your own: "ssh -p 2222" (default: ssh)')
    add("--python", metavar="PATH", default=sys.executable, help="that of the other hosts (default: the same path)")
    add("command", choices=_COMMANDS, help="python -m mnist_dist.COMMAND")
    add("words", nargs=argparse.REMAINDER, metavar="KEY=VALUE", help="for the command")
    return parser


def plan(arguments: Sequence[str]) -> Plan:
    """What the command line asks for; raises UserError."""
    asked = _parser().parse_args(arguments)
    if asked.np is None and asked.hosts is None:
        raise UserError("-np: say how many processes, or with -H on which hosts; all options: --help")
    slots = _slots(asked.hosts) if asked.hosts is not None else {LOCALHOST: asked.np}
    total = sum(slots.values())
    number = total if asked.np is None else asked.np
    most = total if asked.hosts is not None else MAX_PROCESSES
    if not 1 <= number <= most:
        raise UserError(f"-np {number}: must be from 1 to {most}" + (", the slots of -H" if asked.hosts else ""))
    if not 1 <= asked.min_np <= number:
        raise UserError(f"--min-np {asked.min_np}: must be from 1 to {number}, the number of processes")
    words, run_dir = list(asked.words), _run_dir(asked.words)
    is_restarted = asked.command == TRAIN
    if run_dir is None:
        run_dir = _new_path(path_by_time())
        if is_restarted:
            words.append(f"run_dir={run_dir}")
    before = arguments[: len(arguments) - len(asked.words)]
    return Plan(
        slots=slots,
        num_processes=number,
        min_processes=asked.min_np,
        words=("-m", f"mnist_dist.{asked.command}", *words),
        is_restarted=is_restarted,
        run_dir=run_dir,
        leave_s=_LEAVE_S if is_restarted else _CONCLUDE_S,
        ssh=Ssh(_split(asked.ssh), asked.python, _working_directory()),
        command=f"python -m mnist_dist.launch {shlex.join([*before, *words])}",
    )


def _slots(text: str) -> dict[str, int]:
    try:
        slots = parse_hosts(text)
    except ValueError as error:
        raise UserError(f"-H {text[:200]}: {error}; give HOST:SLOTS,HOST:SLOTS") from error
    loopback = [host for host in slots if host == LOCALHOST or host.startswith("127.")]
    if loopback and len(loopback) < len(slots):
        raise UserError(f"-H: {loopback[0]} is each host's own name for itself; give the name that the others know")
    return slots


def _split(text: str) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(f"--ssh={text[:200]}: not a command ({error})") from error
    if not words:
        raise UserError("--ssh: is empty; give a command, such as ssh")
    return words


def _run_dir(words: Sequence[str]) -> Path | None:
    """The run folder that the words name, if they do."""
    values = [value for key, equals, value in (word.partition("=") for word in words) if key.lstrip("+") == "run_dir"]
    value = values[-1].strip("'\"") if values else "null"
    return None if value == "null" else expand_path("run_dir", value)


def _new_path(path: Path) -> Path:
    """A path where there is nothing yet."""
    others = (path.with_name(f"{path.name}_{number}") for number in itertools.count(2))
    return next(one for one in itertools.chain([path], others) if not one.exists())


def _working_directory() -> str:
    try:
        return str(Path.cwd())
    except OSError as error:
        raise UserError("the working directory was removed; change to another one") from error


def launch(arguments: Sequence[str]) -> int:
    """Run the job to its end; returns its exit code. Raises UserError."""
    settle()
    asked = plan(arguments)
    launcher = read_topology().launcher
    if not isinstance(launcher, Alone):
        raise UserError(
            f"{launcher.name} started this process ({launcher.rank_variable} is set): two launchers at once; start "
            "mnist_dist.launch once, without it"
        )
    with Signals() as signals:
        supervisor = Supervisor(asked, signals)
        where = f", run_dir={asked.run_dir}" if asked.is_restarted else ""
        log.info("Starting %d process(es) on %s%s", asked.num_processes, format_hosts(supervisor.places()), where)
        return supervisor.run()


def main() -> NoReturn:
    """The console script."""
    with Console():
        try:
            code = launch(sys.argv[1:])
        except UserError as error:
            log.error("error: %s", " ".join(str(error).splitlines()))
            code = EXIT_USER_ERROR
    sys.exit(code)


if __name__ == "__main__":
    main()
