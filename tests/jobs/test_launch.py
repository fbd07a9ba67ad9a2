"""`python -m mnist_dist.launch`: whatever is lost, the same command goes on by itself, to the same weights."""

import contextlib
import os
import re
import shlex
import signal
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from support import CHECKOUT
from support.job import NUM_EPOCHS, start, wait_for_epoch
from support.launchers import horovodrun
from support.processes import family, freeze, is_alive, kill, send, wait_until
from support.runs import result_of, summary_of
from support.sshd import missing_programs, run_hosts

from mnist_dist.base.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_LOST_PEER, EXIT_OK, EXIT_PREEMPTED
from mnist_dist.launch.losses import read_losses
from mnist_dist.run.events import read_events

LAUNCH = ("-m", "mnist_dist.launch")
HERE, THERE, FAR = "127.0.0.1", "127.0.0.2", "127.0.0.3"


class Launched:
    """A job, its supervisor, and its ranks wherever they are."""

    def __init__(self, words, args, folder: Path, printed_to: Path, env) -> None:
        self.folder = folder
        keys = words.index("train") + 1
        words = [*words[:keys], *args, *words[keys:], f"run_dir={folder}"]
        self.job = start(*LAUNCH, *words, printed_to=printed_to, fresh=True, env=env)
        (self.supervisor,) = self.job.processes

    def ranks(self) -> dict[int, psutil.Process]:
        """Those that run, by rank."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # it is just ending
                variables = process.environ()
                is_ours = variables.get("MNIST_DIST_LOSSES") == f"{self.folder}.losses"
                if is_ours and "mnist_dist.train" in process.cmdline() and is_alive(process):
                    found[int(variables["MNIST_DIST_RANK"])] = process
        return found

    def wait_for_ranks(self, number: int) -> dict[int, psutil.Process]:
        """Wait until so many run, or the job has ended."""
        return wait_until(lambda: found if len(found := self.ranks()) == number or not self.job.is_running() else {})

    def wait_for_epoch(self, epoch: int) -> None:
        wait_for_epoch(self.job, self.folder, epoch)
        assert self.job.is_running(), self.output()

    def code(self) -> int:
        (code,) = self.job.codes()
        assert self.ranks() == {}
        return code

    def output(self) -> str:
        return self.job.output()

    def starts_again(self) -> list[str]:
        return [line for line in self.output().splitlines() if "Starting again" in line]

    def losses(self):
        return read_losses(Path(f"{self.folder}.losses"))

    def suspects(self) -> list[str]:
        path = Path(f"{self.folder}.suspects.txt")
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def launch(args, tmp_path):
    """Start `python -m mnist_dist.launch WORDS`, followed by what all runs have in common."""
    started: list[Launched] = []

    def begin(*words, env=None) -> Launched:
        if "strategy=horovod" in words:
            horovodrun()  # without Horovod the test is skipped
        started.append(Launched(words, args, tmp_path / "run", tmp_path, env))
        return started[-1]

    yield begin
    for one in started:
        one.job.kill()
        send(one.ranks().values(), signal.SIGKILL)


@pytest.fixture(scope="module")
def ssh_programs():
    """Without ssh the test is skipped, or fails where skipping is not allowed (CI)."""
    if missing := missing_programs():
        reason = f"not installed: {', '.join(missing)}; apt-get install openssh-server"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


@pytest.fixture
def hosts(ssh_programs):
    """Two hosts besides this one."""
    with tempfile.TemporaryDirectory(prefix="ssh-") as folder, run_hosts(Path(folder), (THERE, FAR)) as found:
        yield found


@pytest.fixture
def words(hosts):
    """The options for one process on each host."""
    return "-H", f"{HERE}:1,{THERE}:1,{FAR}:1", "--ssh", hosts.command


@pytest.mark.parametrize(
    ("strategy", "size", "lost", "epoch"),
    [
        ("horovod", 3, 1, None), ("horovod", 3, 2, 0), ("horovod", 3, 0, 5), ("multiworker", 2, 0, None),
        ("multiworker", 2, 1, 0), ("multiworker", 2, 1, 5), ("multiworker", 2, 0, NUM_EPOCHS),
    ],
)  # fmt: skip
def test_a_killed_process(strategy, size, lost, epoch, launch, uninterrupted):
    """Before the ranks have met, while TensorFlow starts, in training, and while the results are written."""
    launched = launch("-np", size, "train", f"strategy={strategy}")
    ranks = launched.wait_for_ranks(size)
    if epoch is not None:
        wait_until(lambda: "Strategy: " in launched.output())
        launched.wait_for_epoch(epoch)
    ranks[lost].kill()
    assert launched.code() == EXIT_OK, launched.output()
    assert result_of(launched.folder) == result_of(uninterrupted)
    (line,) = launched.starts_again()
    assert line.startswith(f"Lost: rank {lost} (localhost) was killed by SIGKILL. Starting again from "), line
    assert line.endswith(f"on localhost:{size}")
    (loss,) = launched.losses()
    assert (loss.hosts, loss.how) == ((), f"rank {lost} (localhost) was killed by SIGKILL")
    assert launched.suspects() == []
    assert sorted(path.name for path in launched.folder.parent.glob("run*")) == ["run", "run.losses"]
    if epoch:
        assert f" of {NUM_EPOCHS}\n" in launched.output().partition("Resuming after epoch ")[2]
        assert f"error: rank {lost} (localhost) is gone" in launched.output()


def test_a_frozen_process_is_noticed_by_the_others(launch, uninterrupted):
    launched = launch("-np", 2, "train", "strategy=multiworker")
    launched.wait_for_epoch(3)
    launched.ranks()[1].suspend()
    frozen = time.time()
    assert launched.code() == EXIT_OK, launched.output()
    assert result_of(launched.folder) == result_of(uninterrupted)
    (line,) = launched.starts_again()
    assert line.startswith("Lost: rank 0 (localhost) ended with exit code 76, because another process is gone.")
    (incident,) = summary_of(launched.folder)["incidents"]
    assert incident["how"].startswith("silent for ")
    (_, _, again, _) = read_events(launched.folder)
    assert incident["seconds_lost"] > again.time - frozen - 2  # the silence counts; an epoch may just have been noted


def test_a_second_loss_without_progress_ends_the_job_and_says_how_to_resume(launch, uninterrupted, start_python):
    launched = launch("-np", 2, "train", "strategy=multiworker")
    for _ in range(2):
        ranks = launched.wait_for_ranks(2)
        ranks[1].kill()
        wait_until(lambda ranks=ranks: not any(map(is_alive, ranks.values())))
    assert launched.code() == EXIT_LOST_PEER
    (line,) = [line for line in launched.output().splitlines() if "second loss" in line]
    assert line.startswith("error: rank 1 (localhost) was killed by SIGKILL; the second loss in a row at no checkpoint")
    assert len(launched.losses()) == 2
    python, *command = shlex.split(line[line.index("python -m mnist_dist.launch") :])
    assert python == "python"
    assert start_python(*command, fresh=True).codes() == [EXIT_OK]
    assert result_of(launched.folder) == result_of(uninterrupted)
    assert len(launched.losses()) == 2  # those of the first command


def test_losses_with_progress_in_between_do_not_end_it(launch, uninterrupted):
    launched = launch("-np", 2, "train", "strategy=multiworker")
    for number in range(1, 4):
        launched.wait_for_epoch(number * 10)
        ranks = launched.ranks()
        ranks[number % 2].kill()
        wait_until(lambda number=number: len(launched.starts_again()) == number or not launched.job.is_running())
    assert launched.code() == EXIT_OK, launched.output()
    assert result_of(launched.folder) == result_of(uninterrupted)
    assert len(launched.losses()) == 3


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["train", "data.path=nowhere.npz"], "data.path=nowhere.npz"),
        (["train", "strategy=single"], "strategy=single: is for one process, but mnist_dist.launch started 2"),
        (["train", "oops=1"], "oops"),
    ],
)
def test_wrong_input_ends_it_at_once(words, fragment, small_npz, run_python):
    result = run_python(*LAUNCH, "-np", "2", words[0], "data=npz", f"data.path={small_npz}", *words[1:], fresh=True)
    assert result.returncode == 2, result.stderr
    assert fragment in result.stderr
    assert "Starting again" not in result.stdout
    assert result.stdout.startswith("Starting 2 process(es) on localhost:2, run_dir=runs/20")


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["train"], "-np: say how many"),
        (["-np", "2", "sweep"], "sweep"),
        (["-np", "two", "train"], "invalid int value: 'two'"),
        (["-H", "127.0.0.9:1", "--ssh", "false", "train"], "-H: 127.0.0.9 cannot be reached by false"),
        (["-H", "127.0.0.9:1", "--ssh", "no-such-program", "train"], "--ssh=no-such-program: cannot be started"),
    ],
)
def test_a_wrong_command_is_one_line(words, fragment, run_python):
    result = run_python(*LAUNCH, *words, fresh=True)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert fragment in line


def test_two_launchers_at_once_are_refused(run_python):
    result = run_python(*LAUNCH, "-np", "2", "train", env={"TF_CONFIG": "{}"}, fresh=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: TF_CONFIG=")


def test_without_a_run_folder_it_names_a_new_one(launch, args, start_python, tmp_path):
    job = start_python(*LAUNCH, "-np", 1, "train", *args, "trainer.epochs=1", fresh=True)
    assert job.codes() == [EXIT_OK], job.output()
    named = re.match(r"Starting 1 process\(es\) on localhost:1, run_dir=(runs/\S+)\n", job.output())
    assert (tmp_path / named[1] / "summary.json").is_file()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [Path(named[1]).name]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_stops_all_and_the_same_command_resumes(number, launch, uninterrupted):
    words = ("-np", 2, "train", "strategy=multiworker")
    launched = launch(*words)
    launched.wait_for_epoch(3)
    launched.supervisor.send_signal(number)
    assert launched.code() == EXIT_PREEMPTED, launched.output()
    assert launched.output().count(f"{number.name}: stopping after this epoch\n") == 2
    assert "Stopped on request after epoch " in launched.output()
    again = launch(*words)
    assert again.code() == EXIT_OK, again.output()
    assert "Resuming after epoch " in again.output()
    assert result_of(launched.folder) == result_of(uninterrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, EXIT_INTERRUPTED), (signal.SIGTERM, EXIT_PREEMPTED)])
def test_a_signal_before_the_training(number, code, launch):
    launched = launch("-np", 2, "train", "strategy=multiworker")
    launched.wait_for_ranks(2)
    launched.supervisor.send_signal(number)
    assert launched.code() == code, launched.output()
    assert launched.starts_again() == []
    assert not launched.folder.exists()


@pytest.mark.parametrize(
    ("missed_by", "wait"),
    [("none", "time.sleep(600)")]
    + [(rank, wait) for rank in ("0", "1") for wait in ("time.sleep(600)", "signal.pause()")],
)
def test_ctrl_c_before_the_first_line(missed_by, wait, launch, tmp_path):
    """Python itself ends with 1 then, and prints why; or only prints, if it just was where an exception is ignored.

    Whoever has missed it still sleeps (`sleep`), or waits for the other in the meeting (`pause`), at the next signal.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib, signal, time\n"
        "def miss_one(number, frame):\n"
        "    signal.signal(number, signal.default_int_handler)\n"
        "if rank := os.environ.get('MNIST_DIST_RANK'):\n"
        f"    if rank == '{missed_by}':\n"
        "        signal.signal(signal.SIGINT, miss_one)\n"
        "    pathlib.Path(__file__).with_name(f'{rank}.begun').touch()\n"
        f"    {wait}\n"
    )
    path = os.pathsep.join([str(tmp_path), str(CHECKOUT)])
    launched = launch("-np", 2, "train", "strategy=multiworker", env={"PYTHONPATH": path})
    wait_until(lambda: len(list(tmp_path.glob("*.begun"))) == 2)
    launched.supervisor.send_signal(signal.SIGINT)
    assert launched.code() == EXIT_INTERRUPTED, launched.output()
    assert "KeyboardInterrupt" in launched.output()


def test_a_second_ctrl_c_ends_what_hangs(launch):
    launched = launch("-np", 2, "train", "strategy=multiworker")
    launched.wait_for_epoch(3)
    for rank in launched.ranks().values():
        rank.suspend()
    for _ in range(2):
        launched.supervisor.send_signal(signal.SIGINT)
        time.sleep(1)
    assert launched.code() == EXIT_INTERRUPTED
    assert launched.starts_again() == []


def test_the_ranks_end_with_their_supervisor(launch, uninterrupted):
    launched = launch("-np", 2, "train", "strategy=multiworker")
    launched.wait_for_epoch(3)
    launched.supervisor.kill()
    wait_until(lambda: not launched.ranks())
    again = launch("-np", 2, "train", "strategy=multiworker")
    assert again.code() == EXIT_OK, again.output()
    assert result_of(launched.folder) == result_of(uninterrupted)


def test_a_failure_is_not_a_loss(launch, tmp_path):
    """The folder is moved away: rank 0 fails, and the other with it."""
    launched = launch("-np", 2, "train", "strategy=multiworker", "trainer.epochs=100000")
    launched.wait_for_epoch(3)
    launched.folder.rename(tmp_path / "elsewhere")
    assert launched.code() == EXIT_FAILURE, launched.output()
    assert launched.starts_again() == []
    assert "is not this run's folder any more" in launched.output()


def test_doctor(run_python):
    result = run_python(*LAUNCH, "-np", "2", "doctor", "strategy=multiworker", "data=digits", fresh=True)
    assert "2 on 1 host(s), by mnist_dist.launch" in result.stdout, result.stdout + result.stderr


def test_a_verification_concludes_after_a_loss_and_is_not_started_again(start_python, small_npz, tmp_path):
    arguments = ["strategy=multiworker", "data=npz", f"data.path={small_npz}", f"run_dir={tmp_path}/run"]
    job = start_python(*LAUNCH, "-np", 2, "verify", *arguments, fresh=True)
    wait_until(lambda: "Run folder" in job.output())
    ranks = [one for one in family(job.processes[0]) if "mnist_dist.verify" in one.cmdline()]
    next(one for one in ranks if one.environ()["MNIST_DIST_RANK"] == "1").kill()
    assert job.codes() == [EXIT_FAILURE], job.output()
    assert "rank 1 (localhost) is gone" in job.output()
    assert "Starting again" not in job.output()
    assert (tmp_path / "run" / "verify.json").is_file()


# Hosts


@pytest.mark.parametrize(("strategy", "epoch"), [("horovod", 5), ("multiworker", 0)])
def test_a_host_is_lost(strategy, epoch, launch, hosts, words, uninterrupted):
    launched = launch(*words, "train", f"strategy={strategy}")
    launched.wait_for_epoch(epoch) if epoch else launched.wait_for_ranks(3)
    kill(hosts.daemons[THERE])
    assert launched.code() == EXIT_OK, launched.output()
    assert result_of(launched.folder) == result_of(uninterrupted)
    (line,) = launched.starts_again()
    assert line.endswith(f"on {HERE}:1,{FAR}:1")
    assert f"{THERE} does not answer" in line
    (loss,) = launched.losses()
    assert loss.hosts == (THERE,)
    assert launched.suspects() == [THERE]


def test_one_process_is_left(launch, hosts, uninterrupted):
    """And the first host, with rank 0, is the lost one."""
    launched = launch("-H", f"{THERE}:2,{HERE}:1", "--ssh", hosts.command, "train", "strategy=horovod")
    launched.wait_for_epoch(5)
    kill(hosts.daemons[THERE])
    assert launched.code() == EXIT_OK, launched.output()
    assert result_of(launched.folder) == result_of(uninterrupted)
    (line,) = launched.starts_again()
    assert line.endswith(f"on {HERE}:1")


def test_the_hosts_are_lost_one_after_the_other_until_too_few_are_left(launch, hosts, words):
    launched = launch(*words, "--min-np", 2, "train", "strategy=multiworker", "trainer.epochs=100000")
    launched.wait_for_epoch(3)
    kill(hosts.daemons[THERE])
    wait_until(lambda: launched.starts_again())
    reached = len((launched.folder / "history.csv").read_text().splitlines())
    launched.wait_for_epoch(reached + 20)
    kill(hosts.daemons[FAR])
    assert launched.code() == EXIT_LOST_PEER, launched.output()
    line = launched.output().splitlines()[-1]
    assert f"{FAR} does not answer; 1 process(es) are left, fewer than --min-np 2" in line
    assert "python -m mnist_dist.launch -H" in line
    assert launched.suspects() == [THERE, FAR]


def test_a_frozen_host(launch, hosts, words, uninterrupted):
    launched = launch(*words, "train", "strategy=horovod")
    launched.wait_for_epoch(5)
    frozen = freeze(hosts.daemons[FAR])
    assert launched.job.codes() == [EXIT_OK], launched.output()
    assert result_of(launched.folder) == result_of(uninterrupted)
    assert f"error: rank 2 ({FAR}) is gone (silent for 30 s)" in launched.output()
    assert launched.suspects() == [FAR]
    left = launched.ranks()
    assert left  # it is still frozen
    send(frozen, signal.SIGCONT)
    wait_until(lambda: not launched.ranks())
    assert result_of(launched.folder) == result_of(uninterrupted)


def test_a_lost_connection_to_a_host_that_answers(launch, hosts, words, uninterrupted):
    launched = launch(*words, "train", "strategy=multiworker")
    launched.wait_for_epoch(5)
    sessions = [one for one in hosts.sessions(THERE) if one.name().startswith("sshd")]
    assert sessions
    for one in sessions:
        one.kill()
    assert launched.code() == EXIT_OK, launched.output()
    assert result_of(launched.folder) == result_of(uninterrupted)
    (line,) = launched.starts_again()
    assert line.startswith(f"Lost: rank 1 ({THERE}): ssh has lost it. ")
    assert line.endswith(f"on {HERE}:1,{THERE}:1,{FAR}:1")
    assert launched.suspects() == []


def test_a_killed_process_on_another_host(launch, hosts, words, uninterrupted):
    launched = launch(*words, "train", "strategy=multiworker")
    launched.wait_for_epoch(5)
    launched.ranks()[1].kill()
    assert launched.code() == EXIT_OK, launched.output()
    assert result_of(launched.folder) == result_of(uninterrupted)
    (line,) = launched.starts_again()
    assert line.startswith(f"Lost: rank 1 ({THERE}) was killed by SIGKILL. ")
    assert line.endswith(f"on {HERE}:1,{THERE}:1,{FAR}:1")


def test_signals_and_the_end_of_the_supervisor_reach_other_hosts(launch, hosts):
    """Where no process is here, which would tell the others."""
    words = "-H", f"{THERE}:1,{FAR}:1", "--ssh", hosts.command, "train", "strategy=multiworker", "trainer.epochs=100000"
    launched = launch(*words)
    launched.wait_for_epoch(3)
    launched.supervisor.send_signal(signal.SIGTERM)
    assert launched.code() == EXIT_PREEMPTED, launched.output()
    again = launch(*words)
    wait_until(lambda: "Resuming after epoch" in again.output() and again.output().count("\nEpoch ") > 2)
    again.supervisor.kill()
    wait_until(lambda: not again.ranks())


def test_many_variables_reach_another_host(launch, hosts, monkeypatch):
    """More than a pipe takes by itself."""
    monkeypatch.setenv("HORRIBLY_LONG", "x" * 100_000)
    launched = launch("-H", f"{THERE}:1", "--ssh", hosts.command, "train", "trainer.epochs=100000")
    launched.wait_for_epoch(1)
    assert launched.ranks()[0].environ()["HORRIBLY_LONG"] == "x" * 100_000


def test_no_secret_is_in_a_command_line(launch, hosts, words):
    launched = launch(*words, "train", "strategy=multiworker", "trainer.epochs=100000")
    launched.wait_for_epoch(1)
    secrets = {rank.environ()["MNIST_DIST_SECRET"] for rank in launched.ranks().values()}
    (secret,) = secrets
    assert len(secret) == 64
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            assert secret not in " ".join(process.cmdline())
