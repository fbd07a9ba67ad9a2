"""A job as a user starts it: start it, wait for it, stop it, kill it, read its output. Without TensorFlow."""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from support import launchers
from support.launchers import horovodrun, tf_config
from support.processes import family, fork_server, freeze, is_alive, kill, python_environment
from support.runs import history_of

TRAIN = ("-m", "mnist_dist.train")
NUM_EPOCHS = 40
"""Of the runs on the small data set: enough to be stopped in, over in a second."""
DOCTOR_HINT = "; python -m mnist_dist.doctor tells more"
"""How the line of an error ends whose cause is the environment."""
SINGLE, MIRRORED, HOROVOD = ("single", 1), ("mirrored", 2), ("horovod", 2)


def job_name(kind) -> str:
    """What a kind of job, (strategy, processes or replicas), is called in the list of tests."""
    return f"{kind[0]} x{kind[1]}"


@dataclass
class Job:
    """The processes that a user starts for a job, and the two output files of each."""

    processes: list[psutil.Process]
    printed: list[tuple[Path, Path]]

    def is_running(self) -> bool:
        """Whether all processes are still running."""
        return all(map(is_alive, self.processes))

    def output(self) -> str:
        """Everything printed so far, each process's standard output before its errors."""
        return "".join(path.read_text(errors="replace") for pair in self.printed for path in pair)

    def wait(self, timeout_s: float = 300) -> list[subprocess.CompletedProcess[str]]:
        """Wait for all to end; returns how each ended. Raises psutil.TimeoutExpired and leaves them running."""
        codes = [process.wait(timeout_s) for process in self.processes]
        texts = [[path.read_text(errors="backslashreplace") for path in pair] for pair in self.printed]
        return [subprocess.CompletedProcess([], int(code), *text) for code, text in zip(codes, texts, strict=True)]

    def codes(self, timeout_s: float = 120) -> list[int]:
        """Wait for all to end; returns their exit codes."""
        return [result.returncode for result in self.wait(timeout_s)]

    def kill(self) -> None:
        """kill -9 all of it."""
        for process in self.processes:
            kill(process)

    def freeze(self) -> list[psutil.Process]:
        """Stop all of it; returns every process in the order they were started."""
        return [one for process in self.processes if is_alive(process) for one in freeze(process)]

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes that train, by rank; under horovodrun, those started so far."""
        if "-np" not in self.processes[0].cmdline():
            return dict(enumerate(self.processes))
        found = {}
        for process in family(self.processes[0]):
            with contextlib.suppress(psutil.Error):  # it is just ending
                rank = process.environ().get("HOROVOD_RANK")
                if rank is not None and process.cmdline()[:1] == [sys.executable]:
                    found[int(rank)] = process
        return found


def start(*words, printed_to: Path, env=None, cwd=None, prefix=(), fresh=False) -> Job:
    """Start `python *words`, forked off a process that has imported its libraries.

    Args:
        words: what follows `python`.
        printed_to: a folder for the files that take what it prints.
        env: environment variables in addition to those of `python_environment`.
        cwd: where it runs, by default in `printed_to`.
        prefix: words before the whole command.
        fresh: start a new interpreter, for programs that need to do their own imports.
    """
    environment = {**python_environment(), **(env or {})}
    folder = Path(tempfile.mkdtemp(prefix="printed-", dir=printed_to))
    printed = folder / "stdout", folder / "stderr"
    for path in printed:
        path.touch()
    if not fresh and not prefix:
        process = fork_server().start(words, env=environment, cwd=cwd or printed_to, printed=printed)
    else:
        with printed[0].open("w") as out, printed[1].open("w") as err:
            process = psutil.Popen(
                [*prefix, sys.executable, *map(str, words)],
                env=environment,
                cwd=cwd or printed_to,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
    return Job([process], [printed])


def start_job(
    kind, *args, printed_to: Path, launcher=None, nodes=("127.0.0.1",), script=TRAIN, env=None, per_rank=None,
    delays_s=None, ports=None, started=None, **options,
) -> Job:  # fmt: skip
    """Start a training job of a kind, (strategy, processes or replicas), as a user does.

    Args:
        kind: for example ("horovod", 2).
        args: keys and values.
        printed_to: a folder for the files that take what it prints.
        launcher: "srun" for Horovod and multiworker; by default horovodrun, and TF_CONFIG.
        nodes: under "srun" the names of this machine that are taken for its nodes.
        script: what replaces `-m mnist_dist.train`.
        env: environment variables for all processes.
        per_rank: more arguments for individual ranks (not under horovodrun).
        delays_s: how long after the previous rank individual ranks start.
        ports: of individual ranks of multiworker.
        started: a list that gets each process as soon as it is started.
        options: as for `start`.
    """
    strategy, size = kind
    words = [*map(str, script), f"strategy={strategy}", *map(str, args)]
    if strategy == "mirrored":
        words.append(f"strategy.num_replicas={size}")
    if strategy == "horovod" and launcher is None:
        options = {**options, "prefix": [*options.get("prefix", ()), horovodrun(), "-np", str(size)], "fresh": True}
    environments = [{}]
    if launcher == "srun":
        horovodrun() if strategy == "horovod" else None
        environments = launchers.srun(size, nodes)
    elif strategy == "multiworker":
        environments = tf_config(launchers.local_addresses(size, ports))
    job = Job([] if started is None else started, [])
    for rank, variables in enumerate(environments):
        time.sleep((delays_s or {}).get(rank, 0))
        more = (per_rank or {}).get(rank, [])
        one = start(*words, *more, printed_to=printed_to, env={**(env or {}), **variables}, **options)
        job.processes += one.processes
        job.printed += one.printed
    return job


def wait_for_epoch(job: Job, folder: Path, epoch: int) -> None:
    """Wait until `history.csv` has that many epochs, or the job has ended."""
    while job.is_running():
        with contextlib.suppress(OSError, ValueError):
            if len(history_of(folder).epochs) >= epoch:
                return
        time.sleep(0.002)


@contextlib.contextmanager
def stopped_after(job: Job, folder: Path, epoch: int) -> Iterator[None]:
    """Hold a job of one process still, somewhere after `epoch`, while the block runs."""
    wait_for_epoch(job, folder, epoch)
    frozen = job.freeze()
    assert frozen and all(map(is_alive, frozen)), job.output()
    yield
    for process in frozen:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()
