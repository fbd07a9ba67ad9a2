"""`sbatch --array slurm/sweep.sh` on a real Slurm: tasks that take trials from one folder, and are killed."""

import os
import signal
from dataclasses import replace

import pytest
from support.batch import Batch, Job, wait_until
from support.job import SINGLE, start_job
from support.runs import history_of, result_of, summary_of

from mnist_dist.run.sweep_folder import Sweep, read_sweep

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]

NUM_TRIALS, NUM_TASKS = 12, 3
RATES = [round(0.01 * (i + 1), 2) for i in range(NUM_TRIALS - 1)] + [1e30]


@pytest.fixture
def start_sweep(submit, small, desk):
    """Start `sbatch --array slurm/sweep.sh` with the small data set; returns its tasks."""

    def start(name: str, space: str, *arguments: str, num_tasks: int = NUM_TASKS, options=(), **more) -> list[Job]:
        (desk / f"{name}.yaml").write_text(space)
        data = [word for word in small if not word.startswith("trainer")]
        options = [f"--array=0-{num_tasks - 1}", *options]
        words = [*data, f"space={name}.yaml", *arguments]
        first = submit(*words, script="sweep", options=options, log="sweep-{}_0.log", task="_0", **more)
        number = first.job_id.removesuffix("_0")
        folder = desk / "runs" / f"sweep-{number}"
        return [
            replace(first, job_id=f"{number}_{i}", log=desk / "runs" / f"sweep-{number}_{i}.log", folder=folder)
            for i in range(num_tasks)
        ]

    return start


def check_ended(batch: Batch, *, restarts: int) -> None:
    assert (batch.state, batch.returncode, batch.num_restarts) == ("COMPLETED", 0, restarts), batch.log


def current_epochs(task: Job) -> int:
    """How many epochs the trial has that a task is training."""
    started = [line.split()[1].rstrip(":") for line in task.text().splitlines() if line.startswith("Trial ")]
    path = task.folder / "trials" / f"{int(started[-1]):04d}" if started else task.folder
    try:
        return 0 if (path / "summary.json").exists() else len(history_of(path).epochs)
    except (OSError, ValueError):
        return 0


def check_trials(found: Sweep, tmp_path, small) -> None:
    """Check that each trial was given once, and has the result of an uninterrupted training."""
    assert [trial.number for trial in found.trials] == list(range(NUM_TRIALS))
    assert len({trial.overrides for trial in found.trials}) == NUM_TRIALS
    *good, bad = found.trials
    assert (bad.state, bad.params["optimizer.learning_rate"], len(bad.attempts)) == ("failed", 1e30, 1)
    assert "loss became nan" in bad.reason
    assert {trial.state for trial in good} == {"finished"}
    resumed = [trial for trial in good if any(one.from_epoch for one in trial.attempts)]
    assert resumed
    data = [word for word in small if not word.startswith("trainer")]
    for trial in resumed:
        run_dir = tmp_path / str(trial.number)
        words = [*found.plan.overrides, *trial.overrides, *data, f"run_dir={run_dir}"]
        job = start_job(SINGLE, *words, printed_to=tmp_path)
        assert job.codes() == [0], job.output()
        assert result_of(run_dir) == result_of(found.run_dir(trial))
        assert trial.value == summary_of(run_dir)["val"]["accuracy"]


def test_an_array_whose_tasks_are_killed(start_sweep, tmp_path, small):
    """Each task is killed once in the middle of a trial; Slurm starts it again, and the trials are resumed."""
    space = f"optimizer.learning_rate: choice({','.join(map(str, RATES))})\n"
    words = ["sampler=grid", "optimizer=sgd", "trainer.epochs=150", f"num_trials={NUM_TRIALS}"]
    tasks = start_sweep("killed", space, *words)
    for task in tasks:
        wait_until(lambda task=task: current_epochs(task) >= 3, task)
        os.kill(task.processes()[0], signal.SIGKILL)
    for task in tasks:
        check_ended(task(), restarts=1)
        assert (
            "goes back into the queue: a process of the job was lost; it will continue with runs/sweep-" in task.text()
        )
        assert f"{NUM_TRIALS} trials are done: {NUM_TRIALS - 1} finished, 1 failed" in task.text()
    found = read_sweep(tasks[0].folder)
    assert sum(len(trial.attempts) for trial in found.trials) >= NUM_TRIALS + NUM_TASKS - 1
    check_trials(found, tmp_path, small)
    assert (tasks[0].folder / "report.html").is_file()


def test_a_warning_stops_the_trial_and_the_task_comes_back(start_sweep):
    """The time is nearly up: the trial saves, the task is requeued, and goes on with it."""
    words = ["trainer.epochs=300", "num_trials=1", "sampler=random"]
    (task,) = start_sweep("warned", "model.dropout: interval(0.1,0.5)\n", *words, num_tasks=1)
    wait_until(lambda: current_epochs(task) >= 3, task)
    task.ask("scancel", "--signal=USR2", task.job_id)
    check_ended(task(), restarts=1)
    assert "goes back into the queue: stopped on request" in task.text()
    (trial,) = read_sweep(task.folder).trials
    assert trial.state == "finished"
    assert [one.from_epoch > 0 for one in trial.attempts] == [False, True]


def test_a_trial_that_ran_out_of_memory_does_not_keep_a_task_from_coming_back(start_sweep):
    """Slurm says so of the whole task; the sweep has noted it for the trial, and was asked to stop later."""
    line = "srun: error: node1: task 0: Out Of Memory"
    is_logged = "grep -q Out.Of.Memory runs/sweep-${SLURM_ARRAY_JOB_ID}_0.log"
    task = f'((SLURM_RESTART_COUNT)) && exit 0; echo "{line}" >&2; until {is_logged}; do sleep 0.1; done; exit 75'
    (task,) = start_sweep("memory", "model.dropout: 0.1,0.2\n", num_tasks=1, site=f"launcher=(bash -c '{task}')")
    batch = task()
    check_ended(batch, restarts=1)
    assert line in batch.log
    assert "goes back into the queue: stopped on request" in batch.log


def test_what_is_wrong_is_one_line(start_sweep):
    (task,) = start_sweep("wrong", "optimizer.learning_rat: interval(0.1,0.5)\n", num_tasks=1)
    batch = task()
    assert (batch.state, batch.returncode, batch.num_restarts) == ("FAILED", 2, 0), batch.log
    (line,) = [line for line in batch.log.splitlines() if line.startswith("error: ")]
    assert "optimizer.learning_rat" in line


def test_one_process_for_each_task(start_sweep):
    (task,) = start_sweep("nodes", "model.dropout: 0.1,0.2\n", num_tasks=1, options=["--nodes=2"])
    batch = task()
    assert (batch.state, batch.returncode) == ("FAILED", 2), batch.log
    assert "a task of a sweep is one process" in batch.log
