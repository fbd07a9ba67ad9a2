"""Disturbs runs at random moments, repeats their command to the end, and compares the result with an undisturbed run's.

All processes of a run or one of them are killed, one is frozen, the disk is full, a node of a Slurm job is lost
(`soak_nodes.py`). `test_kills.py` does some of this with fixed seeds, `make soak` as often as you like
(`python tests/support/soak.py --help`).
"""

import argparse
import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import psutil
import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support import soak_nodes
from support.data import create_small_arrays
from support.hooks import WRITE_HOOK, WriteHook
from support.job import HOROVOD, MIRRORED, NUM_EPOCHS, SINGLE, TRAIN, job_name, start_job
from support.processes import is_alive, send
from support.runs import Result, result_of, summary_of
from support.slurm_cluster import missing_programs
from support.soak_nodes import Loss

MULTIWORKER = ("multiworker", 2)
MAX_END_S = 60
"""How long the other processes may take to end after one was killed; far more than they should."""
START_TIMEOUT = "strategy.start_timeout_s=30"
"""How long a rank waits for one that was killed before it came: less than `MAX_END_S`."""
MAX_WAIT_S = 180
"""How long a job may take to come to a moment, or to its end, on a busy machine."""

STAGES = ("config", "start-up", "import", "tracing", "epoch", "history", "save", "results")
"""The first file; before TensorFlow; its import; the first epoch; a later one; what is written after each; the end."""
FRESH_STAGES = ("start-up", "import")
"""Those that a process is over with when it is forked off one that has imported TensorFlow."""
FILES = {"config": "config.yaml", "history": "history.csv", "save": "epoch-{:05d}.ckpt"}
RESULTS = ("model.keras", "accuracy.png", "loss.png", "confusion_matrix.png", "summary.json")


class Difference(AssertionError):
    """A run did not resume as it should have."""


Fault = Literal["kill", "kill one rank", "freeze one rank", "full disk"]
"""One rank is picked at random, and the others end by themselves; a disk that is full gets room again afterwards."""


class Scenario(NamedTuple):
    """Which job, and what is done to it."""

    jobs: tuple[tuple[str, int], ...]
    """Each time the command is given it is for the next of these, and again from the first one."""
    fault: Fault = "kill"

    @property
    def of_one_rank(self) -> bool:
        return self.fault in ("kill one rank", "freeze one rank")

    def __str__(self) -> str:
        return ", then ".join(job_name(job) for job in self.jobs) + ("" if self.fault == "kill" else f", {self.fault}")


SCENARIOS = (
    Scenario((SINGLE,)),
    Scenario((MIRRORED,)),
    Scenario((HOROVOD,)),
    Scenario((HOROVOD,), "kill one rank"),
    Scenario((HOROVOD, SINGLE, MIRRORED)),
    Scenario((MULTIWORKER,)),
    Scenario((MULTIWORKER,), "kill one rank"),
    Scenario((HOROVOD,), "freeze one rank"),
    Scenario((MULTIWORKER, HOROVOD), "freeze one rank"),
    Scenario((SINGLE, HOROVOD), "full disk"),
)


@dataclass
class Kill:
    """What was killed (or frozen, or had no room), and what came of it."""

    stage: str
    """As the stopped processes and their files show, whatever was aimed at."""
    job: str
    after_s: float
    """Since the command was given."""
    epoch: int
    """The last one with a checkpoint."""
    rank: int | None
    """None: all processes."""
    temporary: str | None
    """A file that was half written."""
    end_s: float | None = None
    """How long the survivors took to end."""
    hangs: bool = False
    """They did not."""
    fault: Fault = "kill"

    def __str__(self) -> str:
        who = ("" if self.rank is None else f" rank {self.rank}") + ("" if "kill" in self.fault else f" ({self.fault})")
        writing = f", writing {self.temporary}" if self.temporary else ""
        ended = "" if self.end_s is None else f", others ended in {self.end_s:.1f} s"
        hangs = f", OTHERS DID NOT END IN {MAX_END_S} s" if self.hangs else ""
        return f"{self.stage}{who} at {self.after_s:.1f} s with epoch {self.epoch} saved{writing}{ended}{hangs}"


class Attempt:
    """One execution of the command."""

    def __init__(self, kind, args, folder: Path, *, hook: WriteHook | None = None, fresh: bool = False) -> None:
        """Start it; `fresh`: with its own imports, and Horovod's ranks by horovodrun instead of srun."""
        printed_to = folder.parents[1] if folder.parent.is_mount() else folder.parent
        self.kind, self.folder, self.hook = kind, folder, hook
        self._log_begin = log_size(folder)
        self._temporaries_before = temporaries(folder)
        self._epoch_before = newest_epoch(folder)
        self._started = time.monotonic()
        self._job = start_job(
            kind,
            *args,
            START_TIMEOUT,
            f"run_dir={folder}",
            script=WRITE_HOOK if hook else TRAIN,
            env=hook.environment() if hook else None,
            printed_to=printed_to,
            launcher="srun" if kind == HOROVOD and not fresh else None,
            fresh=fresh,
        )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def is_running(self) -> bool:
        """Whether any of its processes is running."""
        return any(map(is_alive, self._job.processes))

    @property
    def log(self) -> str:
        """What this attempt has written to `train.log`."""
        with contextlib.suppress(FileNotFoundError), (self.folder / "train.log").open() as stream:
            stream.seek(self._log_begin)
            return stream.read()
        return ""

    @property
    def resumed(self) -> int:
        """The epoch after which it resumed."""
        match = re.search(rf"^Resuming after epoch (\d+) of {NUM_EPOCHS}$", self.log, re.MULTILINE)
        return int(match[1]) if match else 0

    @property
    def is_training(self) -> bool:
        return "Run folder: " in self.log

    @property
    def is_trained(self) -> bool:
        return f"Epoch {NUM_EPOCHS}/" in self.log or self.resumed == NUM_EPOCHS

    def new_temporaries(self) -> list[str]:
        """The half-written files that are not from an earlier attempt."""
        return sorted(path.name for path in temporaries(self.folder) - self._temporaries_before)

    @property
    def ranks(self) -> dict[int, psutil.Process]:
        """The processes that train, by rank."""
        with contextlib.suppress(psutil.Error):  # it is just ending
            return self._job.ranks()
        return {}

    def wait_until(self, condition) -> None:
        """Wait until it is true or the job has ended; raises Difference."""
        while self.is_running and not condition():
            if self.seconds > MAX_WAIT_S:
                raise Difference(f"{job_name(self.kind)} hangs:\n{self._job.output()}")
            time.sleep(0.005)

    def stage(self) -> str:
        """Where the (stopped) processes are."""
        if self.hook and self.hook.is_held:
            return stage_of_file(self.hook.file)
        if new := self.new_temporaries():
            return stage_of_file(new[0].removeprefix("."))
        if self.is_trained:
            return "results"
        if not has_tensorflow(self.ranks.get(0)):
            return "start-up"
        if not self.is_training:
            return "import"
        return "epoch" if "Epoch " in self.log else "tracing"

    def disturb(self, rank: int | None, *, fault: Fault, after_s: float) -> Kill | None:
        """Do it to that rank (None: all) and see the others end; returns None if there was nothing left to disturb.

        Raises Difference if the job has failed before.
        """
        time.sleep(after_s)
        if not self.is_running:
            self.finish()
            return None
        frozen = self._job.freeze()
        victims = frozen if rank is None else [process for process in frozen if process == self.ranks.get(rank)]
        new = self.new_temporaries()
        made = Kill(
            stage=self.stage(),
            job=job_name(self.kind),
            after_s=self.seconds,
            epoch=newest_epoch(self.folder),
            rank=rank,
            temporary=new[0] if new else None,
        )
        made.fault = fault
        began = time.monotonic()
        others = [process for process in frozen if process not in victims]
        with contextlib.ExitStack() as stack:
            if fault == "full disk":
                others = frozen
                stack.enter_context(no_room(self.folder))
            elif fault != "freeze one rank":
                send(victims, signal.SIGKILL)
            if self.hook:
                self.hook.release()
            send(others, signal.SIGCONT)
            while any(map(is_alive, others)):
                if time.monotonic() - began > MAX_END_S:
                    send(others, signal.SIGKILL)  # including those whose launcher has ended
                    made.hangs = True
                time.sleep(0.005)
        if (rank is not None or fault == "full disk") and not made.hangs:
            made.end_s = time.monotonic() - began
        send(victims, signal.SIGKILL)
        while self.is_running:
            time.sleep(0.005)
        return made if victims else None

    def finish(self) -> None:
        """Wait for it to end; raises Difference unless it ended well."""
        self.wait_until(lambda: False)
        codes = self._job.codes()
        if any(codes):
            raise Difference(f"{job_name(self.kind)} ended with {codes}:\n{self._job.output()}")

    def check(self) -> None:
        """Raise Difference unless this attempt resumed after the newest checkpoint that was there."""
        output = self._job.output()
        if "cannot be used" in output:
            raise Difference(f"a kill damaged a checkpoint:\n{output}")
        has_begun = self.resumed or "Epoch " in self.log  # else it may have been killed before it said so
        if has_begun and self.resumed != self._epoch_before:
            raise Difference(f"went on after epoch {self.resumed}, not {self._epoch_before}:\n{output}")

    def close(self) -> None:
        """Leave nothing running."""
        self._job.kill()


def stage_of_file(name: str) -> str:
    """The stage in which a file is written, given the start of its name (or its temporary file's name)."""
    begins = {file.partition("{")[0]: stage for stage, file in FILES.items()}
    return next((stage for begin, stage in begins.items() if name.startswith(begin)), "results")


def log_size(folder: Path) -> int:
    path = folder / "train.log"
    return path.stat().st_size if path.exists() else 0


def temporaries(folder: Path) -> set[Path]:
    return set(folder.rglob(".*.tmp"))


def newest_epoch(folder: Path) -> int:
    """The epoch of the newest checkpoint."""
    return max((int(path.stem.removeprefix("epoch-")) for path in folder.glob("checkpoints/epoch-*.ckpt")), default=0)


def has_tensorflow(process: psutil.Process | None) -> bool:
    with contextlib.suppress(psutil.Error):
        return process is not None and any("libtensorflow" in part.path for part in process.memory_maps())
    return False


class Target(NamedTuple):
    """What to kill and when; drawn before anything runs, so that a seed means the same on every machine."""

    stage: str
    rank: int | None
    file: str | None
    """The kill comes while this file is written; None: when the clock says so."""
    moment: float | str
    """Where in its writing (`WriteHook.moment`)."""
    ahead: float
    """Which of the epochs to come, from 0 to 1."""
    delay: float
    """How long after the stage began, from 0 to 1 of what it may be."""


def draw_stages(seed: int, number: int) -> list[str]:
    """All stages, then random ones, in random order; but what comes after the last epoch comes last."""
    generator = random.Random(seed)
    drawn = [*STAGES, *generator.choices(STAGES, k=max(0, number - len(STAGES)))]
    generator.shuffle(drawn)
    return sorted(drawn, key=lambda stage: stage == "results")


def draw_target(scenario: Scenario, stage: str, size: int, *, seed: str) -> Target:
    """The moment in a stage, and which of that many processes is killed."""
    generator = random.Random(seed)
    file = FILES.get(stage)
    if stage == "results" and generator.random() < 0.7:
        file = generator.choice(RESULTS)
    part = round(generator.random(), 3)
    moment = generator.choice([part, part, 1.0, "renamed"])
    rank = generator.randrange(size) if scenario.of_one_rank else None
    return Target(stage, rank, file, moment, generator.random(), generator.random())


@contextlib.contextmanager
def no_room(folder: Path) -> Iterator[None]:
    """Fill the file system of a folder, all but a few bytes, while the block runs."""
    filler = folder.parent / "filler"
    with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while stream.write(bytes(4096)):
            pass
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """While the block runs the folder is a small file system in memory, which only root can mount."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def wait_for(attempt: Attempt, target: Target, *, epoch: int) -> float:
    """Wait until the stage begins; returns how many seconds into it the kill is to come."""
    if attempt.hook:
        attempt.wait_until(lambda: attempt.hook.is_held)
        return 0.0
    num_processes = 1 if attempt.kind[0] == "mirrored" else attempt.kind[1]
    begins, longest_s = {
        "start-up": (lambda: len(attempt.ranks) == num_processes, 0.5),
        "import": (lambda: has_tensorflow(attempt.ranks.get(0)), 1.5),
        "tracing": (lambda: attempt.is_training, 0.4),
        "epoch": (lambda: f"Epoch {epoch}/" in attempt.log, 0.05),
        "results": (lambda: attempt.is_training and attempt.is_trained, 0.8),
    }[target.stage]
    attempt.wait_until(begins)
    return longest_s * target.delay


def run_round(scenario: Scenario, stages, *, seed: int, args, expected: Result, folder: Path) -> Iterator[Kill]:
    """Repeat a run's command, kill it at each of `stages`, then let it finish; raises Difference."""
    for number, stage in enumerate([*stages, None]):
        job = scenario.jobs[number % len(scenario.jobs)]
        if stage is None:
            run_to_end(job, args, folder)
            break
        target = draw_target(scenario, stage, job[1], seed=f"{seed} {number}")
        # Not so far ahead that nothing is left for later kills.
        num_ahead = sum(later in ("epoch", "save") for later in stages[number:])
        reached = newest_epoch(folder)
        epoch = reached + 1 + int(target.ahead * max(0, NUM_EPOCHS - 2 - reached) / max(1, num_ahead))
        hook = None
        if target.file:
            signs = Path(tempfile.mkdtemp(prefix="signs-"))
            hook = WriteHook(target.file.format(epoch), target.moment, signs=signs)
        was_finished = (folder / "summary.json").exists()
        attempt = Attempt(job, args, folder, hook=hook, fresh=target.stage in FRESH_STAGES)
        try:
            after_s = wait_for(attempt, target, epoch=epoch)
            made = attempt.disturb(target.rank, fault=scenario.fault, after_s=after_s)
        finally:
            attempt.close()
            if hook:
                shutil.rmtree(hook.signs)
        attempt.check()
        if made is not None:
            yield made
        elif hook and not hook.is_held and not was_finished:
            raise Difference(f"{hook.file} was never written")
    check_result(folder, expected)


def run_to_end(job, args, folder: Path) -> Result:
    """Run the command undisturbed; raises Difference."""
    attempt = Attempt(job, args, folder)
    try:
        attempt.finish()
    finally:
        attempt.close()
    attempt.check()
    return result_of(folder)


def check_result(folder: Path, expected: Result) -> None:
    """Raise Difference unless the run has ended as if nothing had happened."""
    found = result_of(folder)
    for name in Result._fields:
        if getattr(found, name) != getattr(expected, name):
            raise Difference(f"{name} is {getattr(found, name)}, not {getattr(expected, name)}")
    if (resumed := resumed_after(folder)) != sorted(resumed):
        raise Difference(f"resumed_from_epochs is {resumed}")
    if left := temporaries(folder):
        raise Difference(f"temporary files are left: {sorted(map(str, left))}")


def resumed_after(folder: Path) -> list[int]:
    return summary_of(folder)["resumed_from_epochs"]


def describe(kills) -> str:
    """How often which stage was hit, in total and per scenario's job, and the longest end."""
    rows: dict[str, list[Kill]] = {"all": kills}
    for made in kills:
        rows.setdefault(made.job + ("" if made.fault == "kill" else f", {made.fault}"), []).append(made)
    lines = [f"{'':32}{'faults':>6}" + "".join(f"{stage:>10}" for stage in STAGES)]
    for name, made in rows.items():
        counts = Counter(one.stage for one in made)
        lines.append(f"{name:32}{len(made):6}" + "".join(f"{counts[stage]:10}" for stage in STAGES))
    for fault in dict.fromkeys(one.fault for one in kills):
        if ends := [one.end_s for one in kills if one.fault == fault and one.end_s is not None]:
            lines.append(f"{fault}: the last survivor ended at most {max(ends):.1f} s later")
    lines.append(f"Survivors that did not end: those of {sum(one.hangs for one in kills)} faults.")
    lines.append(f"Faults while a file was half written: {sum(one.temporary is not None for one in kills)}.")
    return "\n".join(lines)


class Soak:
    """Round after round."""

    def __init__(self, options: argparse.Namespace, root: Path) -> None:
        self._options, self._root = options, root
        self.kills: list[Kill] = []
        self.losses: list[Loss] = []

    def run(self) -> Path | None:
        """Returns the folder of the run that went wrong, if one did."""
        options, root = self._options, self._root
        np.savez(root / "small.npz", **create_small_arrays())
        words = ("data=npz", f"data.path={root / 'small.npz'}", "batch.global_size=64")
        (root / "undisturbed").mkdir()
        args = (*words, f"trainer.epochs={NUM_EPOCHS}")
        expected = run_to_end(SINGLE, args, root / "undisturbed" / "run")
        end = time.monotonic() + 60 * options.minutes
        with contextlib.ExitStack() as stack:
            play = partial(self._disturb, args=args, expected=expected)
            rounds: list[Callable[[int], None]] = [partial(play, scenario) for scenario in SCENARIOS]
            if missing := missing_programs():
                print(f"Without lost nodes: not installed: {', '.join(missing)}")
            elif "slurm" not in options.without:
                rounds += [self._prepare_nodes(stack, words)] * 3
            for seed in itertools.count(options.seed):
                if time.monotonic() > end or (options.rounds and seed == options.seed + options.rounds):
                    return None
                folder = root / f"seed-{seed}"
                folder.mkdir()
                try:
                    rounds[seed % len(rounds)](seed)
                except (Exception, pytest.fail.Exception) as difference:  # whatever it is, the counts are printed
                    print(
                        f"DIFFERENCE: {type(difference).__name__}: {difference}\nOnce more: make soak SEED={seed} N=1",
                        flush=True,
                    )
                    return folder
                shutil.rmtree(folder)
        return None

    def _disturb(self, scenario: Scenario, seed: int, *, args, expected: Result) -> None:
        folder = self._root / f"seed-{seed}"
        if any(job[0] in self._options.without for job in scenario.jobs):
            return
        if scenario.fault == "full disk" and os.geteuid() != 0:
            print("Without a full disk: only root can mount one")
            return
        print(f"seed {seed}, {scenario}:", end=" ", flush=True)
        stages = draw_stages(seed, self._options.kills)
        if scenario.fault == "freeze one rank":  # each takes its time
            stages = [stage for number, stage in enumerate(stages) if (number + seed) % 3 == 0]
        with contextlib.ExitStack() as stack:
            if scenario.fault == "full disk":
                folder = folder / "disk"
                folder.mkdir()
                stack.enter_context(small_disk(folder))
            run = folder / "run"
            for made in run_round(scenario, stages, seed=seed, args=args, expected=expected, folder=run):
                print(made, end="; ", flush=True)
                self.kills.append(made)
                if made.hangs and not self._options.allow_hangs:
                    raise Difference(f"the processes that were left alone did not end within {MAX_END_S} s")
            print("went on after", *resumed_after(run), "and ended the same", flush=True)

    def _prepare_nodes(self, stack: contextlib.ExitStack, words) -> Callable[[int], None]:
        args = (*words, f"trainer.epochs={soak_nodes.NUM_EPOCHS}")
        expected = run_to_end(SINGLE, args, self._root / "undisturbed" / "long")
        environment, desk = stack.enter_context(soak_nodes.cluster_with_desk(self._root))

        def play(seed: int) -> None:
            print(f"seed {seed}, three nodes under Slurm:", end=" ", flush=True)
            losses, run = soak_nodes.lose_nodes(seed, args, environment, desk)
            check_result(run, expected)
            self.losses += losses
            print(*losses, sep="; ", end="; ")
            print("went on after", *resumed_after(run), "and ended the same", flush=True)

        return play


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=0, help="number of runs to disturb; 0: no end")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after that")
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the next ones count up")
    parser.add_argument("--kills", type=int, default=len(STAGES), help="faults in a run, at least those of all stages")
    parser.add_argument(
        "--without", nargs="*", default=[], metavar="STRATEGY", help="strategies to leave out, and slurm"
    )
    parser.add_argument("--allow-hangs", action="store_true", help="survivors that do not end are only counted")
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    began = time.monotonic()
    soak = Soak(parser.parse_args(), root)
    failed = soak.run()
    print(f"{(time.monotonic() - began) / 60:.1f} minutes", describe(soak.kills), sep="\n")
    frozen = sum(loss.number is signal.SIGSTOP for loss in soak.losses)
    print(f"Nodes killed: {len(soak.losses) - frozen}, frozen: {frozen}")
    if failed:
        print(f"The run that went wrong, with the output of each command: {failed}")
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
