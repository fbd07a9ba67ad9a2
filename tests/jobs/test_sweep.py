"""Sweeps and grids as users start them: real trainings, killed at any moment."""

import contextlib
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from support.launchers import srun
from support.processes import is_alive, wait_until
from support.runs import history_of, result_of

from mnist_dist.base.files import file_lock
from mnist_dist.cli.main import DOCTOR_HINT
from mnist_dist.run.events import read_events
from mnist_dist.run.sweep_folder import Sweep, SweepFolder, Trial, read_sweep
from mnist_dist.sweep.outcome import LOST, STOPPED

SWEEP = ("-m", "mnist_dist.sweep")
NUM_TRIALS, NUM_WORKERS, NUM_EPOCHS = 12, 3, 60


@pytest.fixture
def space(tmp_path):
    """Write a search space; returns `space=FILE`."""

    def write(*lines):
        (tmp_path / "space.yaml").write_text("\n".join(lines) + "\n")
        return f"space={tmp_path / 'space.yaml'}"

    return write


@pytest.fixture
def begin(start_python, args, tmp_path):
    """Start a command of sweep, in the folder `sweep` of `tmp_path`."""
    return lambda *more: start_python(*SWEEP, *args, f"sweep_dir={tmp_path / 'sweep'}", "report=false", *more)


def trainings_of(worker: psutil.Process) -> list[psutil.Process]:
    """The trainings that a worker has started."""
    with contextlib.suppress(psutil.Error):
        return [child for child in worker.children() if "mnist_dist.train" in child.cmdline()]
    return []


def run_dir_of(training: psutil.Process) -> Path:
    (text,) = [word for word in training.cmdline() if word.startswith("run_dir=")]
    return Path(text.removeprefix("run_dir='").removesuffix("'"))


def num_epochs(run_dir: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return len(history_of(run_dir).epochs)
    return 0


def wait_for_training(worker: psutil.Process, *, but: Sequence[int]) -> Path:
    """The run folder of a training that has made some epochs and will make more, of none of the trials `but`."""
    while is_alive(worker):
        for training in trainings_of(worker):
            with contextlib.suppress(psutil.Error):
                run_dir = run_dir_of(training)
                if int(run_dir.name) not in but and 3 <= num_epochs(run_dir) < NUM_EPOCHS // 2:
                    return run_dir
        time.sleep(0.002)
    pytest.fail("the worker has ended")


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time and content."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def is_nan(trial: Trial) -> bool:
    return trial.params["optimizer.learning_rate"] == 1e30


def check_no_trial_was_trained_twice(sweep: Sweep) -> None:
    for trial in sweep.trials:
        for earlier, later in zip(trial.attempts, trial.attempts[1:], strict=False):
            assert earlier.ended <= later.started, trial
        log = (sweep.path / "trials" / f"{trial.number:04d}.log").read_text()
        assert log.count("Run folder: ") <= len(trial.attempts)


def test_workers_are_killed_and_all_trials_end_as_if_nothing_had_happened(
    begin, space, args, train, tmp_path, record_property
):
    """Three processes share a sweep; each is killed once with a trial under way, and one trial diverges."""
    rates = "optimizer.learning_rate: choice(0.02,0.05,0.1,1e30)"
    lines = ("optimizer: choice(sgd)", rates, "model.dropout: interval(0,0.5)")
    command = (space(*lines), f"num_trials={NUM_TRIALS}", f"trainer.epochs={NUM_EPOCHS}", "seed=3")
    workers = [begin(*command) for _ in range(NUM_WORKERS)]
    killed = []
    for index, worker in enumerate(workers):
        run_dir = wait_for_training(worker.processes[0], but=killed)
        worker.processes[0].send_signal(signal.SIGKILL)
        killed.append(int(run_dir.name))
        workers[index] = begin(*command)
    codes = [worker.codes(240) for worker in workers]
    assert codes == [[0]] * NUM_WORKERS, [worker.output() for worker in workers]

    sweep = read_sweep(tmp_path / "sweep")
    assert [trial.number for trial in sweep.trials] == list(range(NUM_TRIALS))
    assert all(trial.is_final for trial in sweep.trials)
    check_no_trial_was_trained_twice(sweep)
    assert len({trial.overrides for trial in sweep.trials}) == NUM_TRIALS
    diverged = [trial for trial in sweep.trials if is_nan(trial)]
    assert diverged
    for trial in sweep.trials:
        assert trial.state == ("failed" if is_nan(trial) else "finished")
        if is_nan(trial):
            assert "loss" in trial.reason
            assert len([attempt for attempt in trial.attempts if attempt.exit_code == 1]) == 1
    record_property("killed", str(killed))
    for number in killed:
        first, second = sweep.trials[number].attempts
        assert first.reason == LOST
        assert 3 <= first.reached_epoch < NUM_EPOCHS
        assert second.from_epoch == first.reached_epoch
        assert [event.kind for event in read_events(sweep.run_dir(sweep.trials[number]))] == [
            "started", "stopped", "started", "finished",
        ]  # fmt: skip
        alone = tmp_path / f"alone-{number}"
        result = train(alone, *sweep.plan.overrides, *sweep.trials[number].overrides)
        assert result.returncode == 0, result.stderr
        expected, found = result_of(alone), result_of(sweep.run_dir(sweep.trials[number]))
        assert found.weights_sha256 == expected.weights_sha256
        assert found == expected
    best = max(trial.value for trial in sweep.trials if trial.value is not None)
    assert sweep.best.value == best
    assert all(f"Best: trial {sweep.best.number}, validation accuracy {best:.4f}" in one.output() for one in workers)

    before = snapshot(sweep.path)
    again = begin(*command)
    assert again.codes(60) == [0]
    assert "holds this sweep, finished: nothing to do" in again.output()
    assert snapshot(sweep.path) == before
    for change, line in [
        ("seed=4", "seed was 3, is now 4"),
        (f"trainer.epochs={NUM_EPOCHS + 1}", f"trainer.epochs was {NUM_EPOCHS}, is now {NUM_EPOCHS + 1}"),
        ("sampler=random", "sampler was tpe, is now random"),
    ]:
        refused = begin(*command, change)
        assert refused.codes(60) == [2]
        assert refused.output() == (
            f"error: sweep_dir={sweep.path}: holds another sweep ({line}); name another sweep_dir, or use its values\n"
        )
    assert snapshot(sweep.path) == before


def test_one_worker_gives_the_same_trials_twice(space, run_python, args, tmp_path):
    """And if it is continued with more. Each training ends at once, as it does not find a file."""
    space_file = space("optimizer.learning_rate: interval(1e-4,1e-2), log", "model.activation: relu,tanh")

    def sweep(name, *more):
        result = run_python(*SWEEP, *args, "plots.reference=no.csv", space_file, f"sweep_dir={tmp_path / name}", *more)
        assert result.returncode == 1, result.stderr  # every trial has failed
        return read_sweep(tmp_path / name)

    once = sweep("once", "num_trials=3", "jobs=1")
    first = sweep("continued", "num_trials=2")
    continued = sweep("continued", "num_trials=3", "max_attempts=9", "threads.intra_op=1")
    assert (first.plan.num_trials, continued.plan.num_trials) == (2, 3)
    assert continued.trials[:2] == first.trials
    assert [trial.overrides for trial in continued.trials] == [trial.overrides for trial in once.trials]
    assert len({trial.overrides for trial in once.trials}) == 3
    for trial in (*once.trials, *continued.trials):
        assert [attempt.exit_code for attempt in trial.attempts] == [2]
        assert (trial.state, trial.reason.partition(" ")[0]) == ("failed", "plots.reference=no.csv")


def test_a_signal_stops_all_trainings_with_a_checkpoint(begin, space, tmp_path):
    command = (
        space("seed: range(2)"),
        "sampler=grid",
        "jobs=2",
        "trainer.epochs=20000",
        "checkpoint.every_epochs=1000",
    )
    sweep = begin(*command)
    (worker,) = sweep.processes
    wait_until(lambda: len(trainings_of(worker)) == 2)
    run_dirs = [run_dir_of(training) for training in trainings_of(worker)]
    wait_until(lambda: all(num_epochs(run_dir) > 2 for run_dir in run_dirs))
    cores = [set(training.cpu_affinity()) for training in trainings_of(worker)]
    if len(worker.cpu_affinity()) > 1:
        assert cores[0].isdisjoint(cores[1])
        assert cores[0] | cores[1] == set(worker.cpu_affinity())
    worker.send_signal(signal.SIGTERM)
    assert sweep.codes(60) == [75]
    assert sweep.output().endswith("SIGTERM: stopped; run the same command again to continue\n")
    for trial, run_dir in zip(read_sweep(tmp_path / "sweep").trials, run_dirs, strict=True):
        (attempt,) = trial.attempts
        assert (trial.state, attempt.exit_code, attempt.reason) == ("waiting", 75, STOPPED)
        assert attempt.reached_epoch == num_epochs(run_dir) > 2
        assert [event.kind for event in read_events(run_dir)] == ["started", "stopped"]


def test_a_worker_that_waits_for_the_lock_says_so_and_can_be_stopped(begin, space, tmp_path):
    (tmp_path / "sweep").mkdir()
    with file_lock(tmp_path / "sweep" / "sweep.lock"):
        sweep = begin(space("seed: range(2)"), "sampler=grid")
        wait_until(lambda: "waiting for its lock" in sweep.output())
        sweep.processes[0].send_signal(signal.SIGTERM)
        assert sweep.codes(60) == [75]
    assert not (tmp_path / "sweep" / "sweep.json").exists()


def test_a_worker_with_a_training_can_be_stopped_while_the_lock_is_taken(begin, space, tmp_path):
    sweep = begin(space("seed: range(2)"), "sampler=grid", "trainer.epochs=20000", "checkpoint.every_epochs=1000")
    run_dir = wait_for_training(sweep.processes[0], but=[])
    with file_lock(tmp_path / "sweep" / "sweep.lock"):
        sweep.processes[0].send_signal(signal.SIGTERM)
        assert sweep.codes(60) == [75], sweep.output()
    assert [event.kind for event in read_events(run_dir)] == ["started", "stopped"]


def test_a_stop_is_noted_at_once_in_case_the_worker_is_killed(begin, space, tmp_path):
    sweep = begin(space("seed: range(2)"), "sampler=grid", "trainer.epochs=20000", "checkpoint.every_epochs=1000")
    (worker,) = sweep.processes
    wait_for_training(worker, but=[])
    (training,) = trainings_of(worker)
    training.suspend()
    worker.send_signal(signal.SIGTERM)
    record = SweepFolder(tmp_path / "sweep").read_record
    wait_until(lambda: record(0).attempts[0].reason == STOPPED)
    assert record(0).attempts[0].ended is None
    worker.kill()
    training.resume()


def test_a_folder_that_is_moved_away_is_not_made_anew(begin, space, tmp_path):
    sweep = begin(space("seed: range(2)"), "sampler=grid", "trainer.epochs=20000", "checkpoint.every_epochs=1000")
    wait_for_training(sweep.processes[0], but=[])
    (tmp_path / "sweep").rename(tmp_path / "moved")
    assert sweep.codes(60) == [1], sweep.output()
    assert f"error: {tmp_path / 'sweep'} is not this sweep's folder any more" in sweep.output()
    assert not (tmp_path / "sweep").exists()


def test_how_to_continue_a_sweep_whose_folder_was_not_given(start_python, args, space, tmp_path):
    sweep = start_python(*SWEEP, *args, space("seed: range(2)"), "sampler=grid", "trainer.epochs=20000")
    wait_until(lambda: "Trial 0: " in sweep.output())
    sweep.processes[0].send_signal(signal.SIGINT)
    assert sweep.codes(60) == [130]
    (folder,) = (tmp_path / "runs").iterdir()
    line = f"SIGINT: stopped; run the same command again with sweep_dir=runs/{folder.name} to continue\n"
    assert sweep.output().endswith(line)


def test_a_crash_is_tried_again_and_a_bad_combination_is_not(begin, space, tmp_path):
    lines = ["optimizer: choice(sgd)", "optimizer.momentum: choice(0.0,0.9)", "optimizer.nesterov: false,true"]
    sweep = begin(space(*lines), "sampler=grid", "num_trials=2", "max_attempts=2")
    (worker,) = sweep.processes
    seen: set[int] = set()
    while is_alive(worker):
        for training in trainings_of(worker):
            with contextlib.suppress(psutil.Error):
                if training.pid not in seen and run_dir_of(training).name == "0000":
                    seen.add(training.pid)
                    training.send_signal(signal.SIGKILL)
        time.sleep(0.01)
    assert sweep.codes() == [1], sweep.output()
    killed, bad = read_sweep(tmp_path / "sweep").trials
    assert [attempt.exit_code for attempt in killed.attempts] == [-9, -9]
    assert killed.reason == "killed by SIGKILL (out of memory?) (tried 2 times from epoch 0)"
    assert [attempt.exit_code for attempt in bad.attempts] == [2]
    assert bad.reason == "optimizer.nesterov=True: needs optimizer.momentum greater than 0"
    assert {killed.state, bad.state} == {"failed"}


def test_a_worker_ends_where_the_machine_is_at_fault(begin, space, tmp_path):
    """Its trainings cannot write checkpoints; the trial is not counted as tried, and no other one is started."""
    command = (space("seed: range(2)"), "sampler=grid", "max_attempts=1")
    sweep = begin(*command)
    sweep.processes[0].rlimit(psutil.RLIMIT_FSIZE, (20_000, 20_000))  # what it starts has the same limit
    assert sweep.codes(60) == [1], sweep.output()
    line = sweep.output().splitlines()[-1]
    assert line.startswith("error: trial 0: ")
    assert line.endswith(f"; {DOCTOR_HINT}")
    (trial,) = read_sweep(tmp_path / "sweep").trials
    assert (trial.state, len(trial.attempts)) == ("waiting", 1)
    again = begin(*command)
    assert again.codes(60) == [0], again.output()


def test_a_worker_ends_where_one_trial_after_the_other_crashes(begin, space, tmp_path):
    sweep = begin(space("seed: range(9)"), "sampler=grid", "max_attempts=2")
    (worker,) = sweep.processes
    while is_alive(worker):
        for training in trainings_of(worker):
            with contextlib.suppress(psutil.Error):
                training.kill()
        time.sleep(0.01)
    assert sweep.codes() == [1]
    line = sweep.output().splitlines()[-1]
    assert line.startswith("error: 2 trials in a row have crashed on this machine without a new checkpoint; trial 1: ")
    states = [(trial.state, len(trial.attempts)) for trial in read_sweep(tmp_path / "sweep").trials]
    assert states == [("failed", 2), ("waiting", 1)]


NO_OPTUNA = "import sys; sys.modules['optuna'] = None; from mnist_dist.sweep.__main__ import main; main()"


def test_refused_before_anything_starts(run_python, args, tmp_path):
    def refuse(*words, **options):
        result = run_python(*words, cwd=tmp_path, **options)
        assert (result.returncode, result.stdout) == (2, "")
        assert not list(tmp_path.iterdir())
        return result.stderr

    line = "error: optuna is not installed, which searches: pip install 'mnist-dist[sweep]'\n"
    assert refuse("-c", NO_OPTUNA, *args) == line
    assert refuse(*SWEEP, "data=npz", "data.path=no.npz").startswith("error: data.path=no.npz: ")
    bad = refuse(*SWEEP, *args[:2], "optimizer.learning_rate=0.1")
    assert bad.startswith("error: space=mlp: optimizer.learning_rate=0.1: the search space varies this key")
    for environment in srun(2):
        assert "error: 2 processes: a sweep is started by one process" in refuse(*SWEEP, *args[:2], env=environment)
        assert "error: --multirun: 2 processes were started" in refuse(
            "-m", "mnist_dist.train", "-m", *args, env=environment
        )


# --multirun


def test_a_grid_goes_on_after_a_failure_and_is_not_trained_twice(run_python, args, small_npz, tmp_path):
    grid = tmp_path / "my grid"
    words = ("-m", "mnist_dist.train", "--multirun", *args, f"data.path=no.npz,{small_npz}", f"run_dir='{grid}'")
    result = run_python(*words)
    assert result.returncode == 2
    assert "error: data.path=no.npz: " in result.stderr
    assert [path.name for path in sorted(grid.iterdir())] == ["1"]
    before = snapshot(grid)
    again = run_python(*words)
    assert again.returncode == 2
    assert "1 holds this run, finished: nothing to do" in again.stdout
    assert snapshot(grid) == before


def test_a_signal_ends_a_grid(start_python, args, tmp_path):
    grid = start_python(
        "-m", "mnist_dist.train", "-m", *args, "trainer.epochs=20000", "checkpoint.every_epochs=1000", "seed=1,2",
        f"run_dir={tmp_path / 'grid'}", "report=false",
    )  # fmt: skip
    wait_until(lambda: num_epochs(tmp_path / "grid" / "0") > 2)
    grid.processes[0].send_signal(signal.SIGINT)
    assert grid.codes(60) == [130]
    assert [path.name for path in (tmp_path / "grid").iterdir()] == ["0"]
    assert [event.kind for event in read_events(tmp_path / "grid" / "0")] == ["started", "stopped"]
