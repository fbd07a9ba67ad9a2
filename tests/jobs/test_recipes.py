"""Recipes other than the default one: the same bits with every strategy, early ends, and schedules when resuming."""

import shutil

import pytest
from support.job import HOROVOD, MIRRORED, SINGLE, job_name
from support.runs import checkpoints_of, history_of, result_of, summary_of

from mnist_dist.run.events import read_events

MULTIWORKER = ("multiworker", 2)
EVERYTHING = (
    *("optimizer=adamw", "optimizer.weight_decay=0.1", "gradient_clip_norm=0.5", "loss.label_smoothing=0.1"),
    *("learning_rate.schedule=cosine", "learning_rate.warmup_epochs=1.5", "trainer.epochs=6"),
)


@pytest.fixture(scope="module")
def everything(tmp_path_factory, train):
    """Uninterrupted runs of one process, by precision and compiler."""
    root = tmp_path_factory.mktemp("everything")

    def run(*more):
        folder = root / " ".join(more).replace("=", " ")
        if not folder.exists():
            result = train(folder, *EVERYTHING, *more)
            assert result.returncode == 0, result.stderr
        return folder

    return run


@pytest.mark.parametrize(
    ("job", "more"),
    [
        (MIRRORED, ["precision=float32"]),
        (MULTIWORKER, ["precision=float32"]),
        (HOROVOD, ["precision=float32"]),
        (MIRRORED, ["precision=mixed_float16"]),
        (HOROVOD, ["precision=float32", "compile=xla"]),
    ],
    ids=lambda value: job_name(value) if isinstance(value, tuple) else " ".join(value),
)
def test_the_same_bits_with_all_of_it_at_once(job, more, args, everything, run_job, tmp_path):
    """In two parts, the first of which another number of replicas has computed."""
    folder = tmp_path / "run"
    words = [*args, *EVERYTHING, *more, f"run_dir={folder}"]
    shutil.copytree(everything(*more), folder)
    for path in [*checkpoints_of(folder)[1:], folder / "summary.json", folder / "model.keras"]:
        path.unlink()
    for result in run_job(job, *words, launcher="srun" if job == HOROVOD else None):
        assert result.returncode == 0, result.stderr
    (reached,) = summary_of(folder)["resumed_from_epochs"]
    assert 0 < reached < 6
    assert result_of(folder) == result_of(everything(*more))
    rates = history_of(folder).column("learning_rate")
    assert rates[0] < rates[1] > rates[2] > rates[3] > rates[4] > rates[5] > 0


def test_the_sum_of_squares_does_not_depend_on_the_number_of_threads(run_python):
    """With `fast`, processes may have different ones."""
    script = (
        "import sys, numpy as np, tensorflow as tf\n"
        "from mnist_dist.engine.clipping import clip\n"
        "tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))\n"
        "for size in (1000, 269322, 5000000):\n"
        "    gradient = tf.constant(np.random.default_rng(0).normal(size=size), tf.float32)\n"
        "    clipped = tf.function(clip, autograph=False)(gradient, 1.0)\n"
        "    print(clipped.numpy()[:4].tobytes().hex())\n"
    )
    printed = {run_python("-c", script, str(number), fresh=True).stdout for number in (1, 4, 7)}
    assert len(printed) == 1
    assert len(printed.pop().split()) == 3


# Early ends


@pytest.mark.parametrize("job", [SINGLE, MIRRORED, MULTIWORKER, HOROVOD], ids=job_name)
def test_a_run_without_progress_ends(job, args, run_job, tmp_path):
    folder = tmp_path / "run"
    more = ("optimizer.learning_rate=1e-30", "trainer.patience=3", "trainer.epochs=30", f"run_dir={folder}")
    results = run_job(job, *args, *more, launcher="srun" if job == HOROVOD else None)
    assert [result.returncode for result in results] == [0] * len(results), results[0].stderr
    reason = f"the validation accuracy has not risen above the {history_of(folder).best.val_accuracy:.4f} of epoch 1 "
    reason += "(trainer.patience=3)"
    assert f"Finished after epoch 4 of 30: {reason}\n" in results[0].stdout
    summary = summary_of(folder)
    assert (summary["status"], summary["epochs_completed"], summary["ended_early"]) == ("finished", 4, reason)
    last = read_events(folder)[-1]
    assert (last.kind, last.epoch, last.reason) == ("finished", 4, reason)
    assert f"after 4 epochs of 30: {reason}." in (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def ended_early(tmp_path_factory, train):
    """A run that ends without progress after its second epoch, and its rule; do not change it."""
    folder = tmp_path_factory.mktemp("ended early") / "run"
    rule = "trainer.patience=3"
    result = train(folder, rule)
    assert result.returncode == 0, result.stderr
    assert (len(history_of(folder).epochs), history_of(folder).best.epoch) == (5, 2)
    return folder, rule


@pytest.fixture
def copied(ended_early, tmp_path):
    shutil.copytree(ended_early[0], tmp_path / "run")
    return tmp_path / "run"


def test_the_same_command_again_has_nothing_to_do(copied, ended_early, train):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    others = ["trainer.epochs=50", "trainer.patience=2", "trainer.stop_at_val_accuracy=0.2", "trainer.epochs=2"]
    for more in ([], *([other] for other in others)):
        result = train(copied, ended_early[1], *more)
        assert result.returncode == 0, result.stderr
        assert "holds this run, finished: nothing to do" in result.stdout
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_without_the_rule_it_trains_on(copied, uninterrupted, train):
    """To what it would have been without it."""
    reached = len(history_of(copied).epochs)
    result = train(copied)
    assert result.returncode == 0, result.stderr
    assert f"Resuming after epoch {reached} of 40\n" in result.stdout
    assert result_of(copied) == result_of(uninterrupted)
    summary = summary_of(copied)
    assert (summary["resumed_from_epochs"], summary["ended_early"]) == ([reached], "")


def test_more_patience_trains_on(copied, uninterrupted, train):
    result = train(copied, "trainer.patience=5")
    assert result.returncode == 0, result.stderr
    assert "Resuming after epoch 5 of 40\n" in result.stdout
    assert history_of(copied).column("weights_sha256") == history_of(uninterrupted).column("weights_sha256")[:7]
    assert summary_of(copied)["epochs_completed"] == 7


def test_a_sufficient_accuracy_ends_a_run(train, tmp_path):
    result = train(tmp_path / "run", "trainer.stop_at_val_accuracy=1")
    assert result.returncode == 0, result.stderr
    assert "Finished after epoch 2 of 40: the validation accuracy reached 1.0000 (" in result.stdout
    assert history_of(tmp_path / "run").column("val_accuracy")[-1] == 1


@pytest.mark.parametrize("lost", [["model.keras"], ["summary.json"], ["summary.json", "model.keras", "plots/loss.png"]])
def test_lost_results_are_made_again(lost, copied, ended_early, train):
    for name in lost:
        (copied / name).unlink()
    result = train(copied, ended_early[1])
    assert result.returncode == 0, result.stderr
    assert "Epoch " not in result.stdout
    assert result_of(copied) == result_of(ended_early[0])
    assert summary_of(copied)["ended_early"] == summary_of(ended_early[0])["ended_early"]


def test_a_run_that_was_killed_ends_at_the_same_epoch(copied, ended_early, train):
    for name in ("model.keras", "summary.json", checkpoints_of(copied)[-1].relative_to(copied)):
        (copied / name).unlink()
    result = train(copied, ended_early[1])
    assert result.returncode == 0, result.stderr
    assert "Resuming after epoch" in result.stdout
    assert result_of(copied) == result_of(ended_early[0])


def test_results_of_earlier_epochs_that_cannot_be_made_again(copied, ended_early, train):
    """The run was trained further since, and then its first model was lost."""
    summary = (copied / "summary.json").read_bytes()
    num_epochs = len(history_of(copied).epochs) + 2
    assert train(copied, f"trainer.epochs={num_epochs}").returncode == 0
    (copied / "summary.json").write_bytes(summary)
    (copied / "model.keras").unlink()
    result = train(copied, ended_early[1])
    assert result.returncode == 2
    told = f"give trainer.epochs={num_epochs}, without trainer.patience and trainer.stop_at_val_accuracy, for its"
    assert told in result.stderr
    assert train(copied, f"trainer.epochs={num_epochs}").returncode == 0


def test_processes_must_agree_on_the_rule(args, run_job, tmp_path):
    results = run_job(MULTIWORKER, *args, f"run_dir={tmp_path / 'run'}", per_rank={1: ["trainer.patience=3"]})
    assert [result.returncode for result in results] == [2, 2]
    assert "trainer.patience" in results[0].stderr


# Schedules


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_more_epochs_do_not_change_a_schedule(schedule, train, tmp_path):
    folder, asked = tmp_path / "run", f"learning_rate.schedule={schedule}"
    final = "learning_rate.final_fraction=0.25"
    assert train(folder, asked, final, "trainer.epochs=3").returncode == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = train(folder, asked, final, "trainer.epochs=5")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "(learning_rate.schedule_epochs was 3, is now 5, which by default is trainer.epochs; with " in line
    assert "learning_rate.schedule_epochs=3 it goes on at the schedule's last rate)" in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    result = train(folder, asked, final, "trainer.epochs=5", "learning_rate.schedule_epochs=3")
    assert result.returncode == 0, result.stderr
    assert history_of(folder).column("learning_rate")[3:] == [0.00025, 0.00025]
    (folder / "model.keras").unlink()  # made again, with the same schedule
    result = train(folder, asked, final, "trainer.epochs=3")
    assert result.returncode == 0, result.stderr
    result = train(folder, asked, final, "trainer.epochs=6", "learning_rate.schedule_epochs=3")
    assert result.returncode == 0, result.stderr


def test_more_epochs_with_schedules_that_have_no_end(train, tmp_path):
    for schedule in ("constant", "step"):
        for epochs in (2, 3):
            asked = f"learning_rate.schedule={schedule}"
            result = train(tmp_path / schedule, asked, f"trainer.epochs={epochs}", "learning_rate.step_epochs=2")
            assert result.returncode == 0, result.stderr
    assert history_of(tmp_path / "step").column("learning_rate") == pytest.approx([0.001, 0.001, 0.0001])
