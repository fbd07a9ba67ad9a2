"""Starts the processes of a job, and after a loss starts them again on what is left; checkpoints do the rest.

Any number of processes trains the same bits, and the same command resumes after the last checkpoint: so to go on is to
end what is left of a start, to ask which hosts are still there, and to start the same command on those.
"""

import itertools
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mnist_dist.base.errors import EXIT_FAILURE, EXIT_LOST_PEER, EXIT_OK, UserError
from mnist_dist.launch.child import Share, Signals, exit_code_of, start_child
from mnist_dist.launch.ends import End, Outcome, judge
from mnist_dist.launch.hosts import format_hosts, is_here
from mnist_dist.launch.losses import LOSSES_VARIABLE, Loss
from mnist_dist.launch.remote import signal_line
from mnist_dist.launch.secret import SECRET_VARIABLE
from mnist_dist.launch.ssh import Ssh, tell
from mnist_dist.launch.supervised import describe_rank

log = logging.getLogger("mnist_dist.launch")

_NOTES = (".losses", ".suspects.txt")
_NO_CHECKPOINT = "no checkpoint"
_ANSWER_S = 20.0
# How long processes have to end by a signal, then by SIGKILL, which does not arrive on a lost host.
_TERM_S, _KILL_S = 4.0, 5.0


@dataclass(frozen=True)
class Plan:
    """What is to be started."""

    slots: dict[str, int]
    """How many processes each host takes."""
    num_processes: int
    """At most so many."""
    min_processes: int
    """With fewer the job ends."""
    words: tuple[str, ...]
    """What follows `python` in each process."""
    is_restarted: bool
    """Whether it resumes when it is started again."""
    run_dir: Path
    leave_s: float
    """How long the other processes have to end by themselves when one has."""
    ssh: Ssh
    command: str
    """What the user may type to resume."""


@dataclass
class _Process:
    """One process of a start."""

    name: str
    is_remote: bool
    process: "subprocess.Popen[bytes]"
    signals: set[int] = field(default_factory=set)
    """Those that were sent to it."""

    def send(self, number: int) -> None:
        self.signals.add(int(number))
        if self.process.poll() is not None:
            return
        if self.is_remote:
            tell(self.process, signal_line(number))
        else:
            self.process.send_signal(number)

    def kill(self) -> None:
        """End what this machine has of it, at once."""
        self.signals.add(int(signal.SIGKILL))
        self.process.kill()

    def end(self) -> End | None:
        """How it has ended; None while it runs, or if a signal from here has ended it."""
        code = self.process.poll()
        if code is None or -code in self.signals or code - 128 in self.signals - {signal.SIGINT}:
            return None
        if code == EXIT_FAILURE and signal.SIGINT in self.signals:
            return None  # Python ends with that while it has no line of ours to run yet
        return End(self.name, 128 - code if code < 0 else code)


class Supervisor:
    """Runs a job to its end; for the main thread, in the block of its `signals`."""

    def __init__(self, plan: Plan, signals: Signals) -> None:
        self._plan, self._signals = plan, signals
        self._slots = dict(plan.slots)
        """Of the hosts that have not been lost."""
        self._remote = {host for host in plan.slots if not is_here(host)}
        self._job = secrets.randbelow(2**31)
        self._processes: list[_Process] = []
        self._stopped_by: signal.Signals | None = None
        self._is_hasty = False
        self._noticed = 0.0
        """When the first process of the last start was lost or failed; seconds since 1970."""

    def run(self) -> int:
        """Start the job, as often as it takes; returns its exit code.

        Raises:
            UserError: a host does not answer before anything has been started, or a process cannot be started.
        """
        if (silent := self._ask()) and self._stopped_by is None:
            raise UserError(
                f"-H: {', '.join(silent)} cannot be reached by {' '.join(self._plan.ssh.program)}, see above; correct "
                "-H or --ssh, or leave the host out"
            )
        if self._plan.is_restarted:
            self._forget()
        try:
            return self._run()
        finally:
            for one in self._processes:
                one.kill()  # after an error; most often all have ended

    def _run(self) -> int:
        at_last_loss = None
        for start in itertools.count():
            if self._stopped_by is not None:
                return self._stopped(None)
            self._start(start)
            outcome = self._wait_for_all()
            if self._stopped_by is not None:
                return self._stopped(outcome)
            if not self._plan.is_restarted:
                chief = self._processes[0].end()
                return outcome.code if chief is None or chief.was_lost else chief.code
            silent = self._ask() if outcome.may_be_loss else []
            if self._stopped_by is not None:
                return self._stopped(outcome)
            if not outcome.is_loss and not silent:
                return outcome.code
            how = ", ".join([outcome.how, *(f"{host} does not answer" for host in silent)])
            self._note(Loss(self._noticed, tuple(silent), how))
            checkpoint = self._newest_checkpoint()
            if why_not := self._why_not(checkpoint, at_last_loss):
                log.error("error: %s; %s: %s", how, why_not, self._plan.command)
                return EXIT_LOST_PEER
            at_last_loss = checkpoint
            log.warning("Lost: %s. Starting again from %s, on %s", how, checkpoint, format_hosts(self.places()))
        raise AssertionError

    # Start, and wait

    def places(self) -> list[str]:
        """The host of every rank."""
        hosts = [host for host, number in self._slots.items() for _ in range(number)]
        return hosts[: self._plan.num_processes]

    def _start(self, start: int) -> None:
        self._processes = []
        hosts = self.places()
        shared = {SECRET_VARIABLE: secrets.token_hex(32)}
        if self._plan.is_restarted:
            shared[LOSSES_VARIABLE] = str(self._path(_NOTES[0]).absolute())
        for rank, host in enumerate(hosts):
            variables = {**shared, **describe_rank(rank, hosts, job=self._job, start=start)}
            if is_remote := host in self._remote:
                process = self._plan.ssh.start(host, self._plan.words, {**os.environ, **variables})
            else:
                process = start_child([sys.executable, *self._plan.words], share=Share(variables=variables))
            self._processes.append(_Process(f"rank {rank} ({host})", is_remote, process))

    def _wait_for_all(self) -> Outcome:
        """Wait until all processes have ended; once one has without success, the others are ended too."""
        ends: list[End] = []
        running, measures = list(self._processes), self._measures()
        due_s: float | None = None
        while running:
            if self._is_hasty:
                self._is_hasty, measures = False, itertools.chain([self._kill_all()], measures)
                due_s = time.monotonic()
            if due_s is not None and time.monotonic() >= due_s:
                due_s = time.monotonic() + next(measures)
            self._see_signals(None if due_s is None else max(0.0, due_s - time.monotonic()))
            ended = [one for one in running if one.process.poll() is not None]
            running = [one for one in running if one not in ended]
            new = [end for one in ended if (end := one.end()) is not None]
            ends += sorted(new, key=lambda end: not end.was_lost)
            # Also one that a signal from here has ended: another may have missed it.
            if due_s is None and any(one.process.poll() != EXIT_OK for one in ended):
                self._noticed, due_s = time.time(), time.monotonic() + self._plan.leave_s
        return judge(ends, num_processes=len(self._processes))

    def _measures(self) -> Iterator[float]:
        """Each step ends what still runs, more and more firmly, and yields how long that may take."""
        for one in self._processes:
            one.send(self._stopped_by or signal.SIGTERM)
        yield _TERM_S
        yield self._kill_all()
        while True:
            for one in self._processes:
                one.kill()  # what is left are the near ends of ssh
            yield _KILL_S

    def _kill_all(self) -> float:
        for one in self._processes:
            one.send(signal.SIGKILL)
        return _KILL_S

    # Signals

    def _see_signals(self, timeout_s: float | None) -> None:
        """Wait so long, or until a process has ended; pass the first signal on, the second Ctrl-C ends all at once."""
        for number in self._signals.wait(timeout_s):
            if self._stopped_by is None:
                self._stopped_by = number
                for one in self._processes:
                    one.send(number)
            elif number is signal.SIGINT:
                self._is_hasty = True

    def _stopped(self, outcome: Outcome | None) -> int:
        """The exit code of a job that was asked to stop: that of its processes, if they have ended by themselves."""
        assert self._stopped_by is not None
        if outcome is not None and not outcome.is_loss:
            return outcome.code
        log.warning("%s: stopped; to resume: %s", self._stopped_by.name, self._plan.command)
        return exit_code_of(self._stopped_by)

    # After a loss

    def _ask(self) -> list[str]:
        """Ask all other hosts whether they are still there; returns those that do not answer."""
        knocks = {host: self._plan.ssh.knock(host) for host in self._slots if host in self._remote}
        deadline_s = time.monotonic() + _ANSWER_S
        while any(knock.poll() is None for knock in knocks.values()):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or self._stopped_by is not None:
                break
            self._see_signals(left_s)
        for knock in knocks.values():
            knock.kill()
        return [host for host, knock in knocks.items() if knock.wait() != 0]

    def _forget(self) -> None:
        """Remove the suspects of an earlier command; what it has lost may still hold the run, and stays noted."""
        path = self._path(_NOTES[1])
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"run_dir={self._plan.run_dir}: {path} cannot be removed: {error.strerror}") from error

    def _note(self, loss: Loss) -> None:
        """Write the loss down, for the processes of the next start and for the user; a lost host is not used again."""
        for host in loss.hosts:
            del self._slots[host]
        texts = loss.to_line(), "".join(f"{host}\n" for host in loss.hosts)
        for path, text in zip(map(self._path, _NOTES), texts, strict=True):
            if not text:
                continue
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as stream:
                    stream.write(text)
            except OSError as error:
                log.warning("%s cannot be written (%s)", path, error.strerror)

    def _newest_checkpoint(self) -> str:
        paths = (self._plan.run_dir / "checkpoints").glob("epoch-*.ckpt")
        return max((path.name for path in paths), default=_NO_CHECKPOINT)

    def _why_not(self, checkpoint: str, at_last_loss: str | None) -> str:
        """Why the job cannot be started again, and how to resume it by hand; empty if it can."""
        left = len(self.places())
        if left < self._plan.min_processes:
            return (
                f"{left} process(es) are left, fewer than --min-np {self._plan.min_processes}. To resume, once the "
                "lost hosts are back or left out of -H"
            )
        if checkpoint == at_last_loss:
            return f"the second loss in a row at {checkpoint}, so there is something to repair first. Then, to resume"
        return ""

    def _path(self, suffix: str) -> Path:
        return Path(f"{self._plan.run_dir}{suffix}")
