"""Runs with `tensorboard=true`, killed and resumed: what TensorBoard reads in the end is `history.csv`."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from support.event_files import Shown, read_event_files
from support.hooks import WRITE_HOOK, WriteHook
from support.job import HOROVOD, MIRRORED, NUM_EPOCHS, SINGLE, job_name, wait_for_epoch
from support.launchers import horovodrun
from support.processes import python_environment
from support.runs import checkpoints_of, history_of, result_of

from mnist_dist.engine.tensorboard import TAGS

WANTED = "tensorboard=true"


def event_files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "tensorboard").iterdir())


def check_complete(folder: Path, *, num_epochs: int = NUM_EPOCHS) -> Shown:
    """Each tag has one value for each epoch, in order, and the rest is there once."""
    shown, history = read_event_files(folder / "tensorboard"), history_of(folder)
    assert shown.scalars.keys() == TAGS.keys()
    assert len(history.epochs) == num_epochs
    for tag, column in TAGS.items():
        assert shown.scalars[tag] == list(enumerate(map(np.float32, history.column(column)), start=1))
    assert shown.texts["configuration"][-1][1] == f"```yaml\n{(folder / 'config.yaml').read_text()}```"
    assert [step for step, *_ in shown.images["confusion_matrix/test"]][-1] == num_epochs
    picture = shown.accumulator.Images("confusion_matrix/test")[-1].encoded_image_string
    assert picture == (folder / "plots/confusion_matrix.png").read_bytes()
    return shown


# Every other one of them leaves an epoch that is saved, but not in the event files.
KILLS = [
    WriteHook("config.yaml", 0.5),
    WriteHook("epoch-00003.ckpt", 0.5),
    WriteHook("epoch-00006.ckpt", "renamed"),
    WriteHook("history.csv", "flushed", number=5),
    WriteHook("epoch-00018.ckpt", "renamed"),
    WriteHook("confusion_matrix.png", "renamed"),
    WriteHook("summary.json", 0.5),
]


@pytest.mark.parametrize("every_epochs", [1, 3])
def test_killed_at_chosen_moments(every_epochs, uninterrupted, train, tmp_path):
    folder, more = tmp_path / "run", (WANTED, f"checkpoint.every_epochs={every_epochs}")
    for hook in KILLS:
        result = train(folder, *more, script=WRITE_HOOK, env=hook.environment())
        assert result.returncode == -signal.SIGKILL, result.stdout + result.stderr
        if hook.file.startswith("epoch-") and hook.moment == "renamed":
            written = read_event_files(folder / "tensorboard").scalars["loss/train"]
            assert len(written) == int(hook.file[6:11]) - every_epochs
    result = train(folder, *more)
    assert result.returncode == 0, result.stderr
    assert result_of(folder) == result_of(uninterrupted)
    shown = check_complete(folder)
    assert {tag: len(texts) for tag, texts in shown.texts.items()} == {"configuration": 1}
    assert {tag: len(images) for tag, images in shown.images.items()} == {"confusion_matrix/test": 1}


@pytest.mark.parametrize("job", [SINGLE, MIRRORED, HOROVOD], ids=job_name)
def test_killed_five_times_at_any_moment(job, args, uninterrupted, start, run_job, tmp_path):
    horovodrun() if job == HOROVOD else None
    folder = tmp_path / "run"
    words = (*args, WANTED, f"run_dir={folder}")
    options = {"launcher": "srun" if job == HOROVOD else None}
    for epoch in (1, 4, 5, 12, 23):
        process = start(job, *words, **options)
        wait_for_epoch(process, folder, epoch)
        assert process.is_running(), process.output()
        process.kill()
    for result in run_job(job, *words, **options):
        assert result.returncode == 0, result.stderr
    assert result_of(folder) == result_of(uninterrupted)
    check_complete(folder)
    assert len(event_files_of(folder)) <= 6  # one for each start, of one process


def test_a_torn_end_and_a_damaged_checkpoint(train, uninterrupted, tmp_path):
    """The event files are ahead of the checkpoint that is used, whose next epochs are trained again."""
    folder = tmp_path / "run"
    train(folder, WANTED, script=WRITE_HOOK, env=WriteHook("epoch-00009.ckpt", 0.5).environment())
    events = folder / "tensorboard/events.out.tfevents.00001"
    events.write_bytes(events.read_bytes()[:-7])
    train(folder, WANTED, script=WRITE_HOOK, env=WriteHook("epoch-00015.ckpt", 0.5).environment())
    assert event_files_of(folder) == ["events.out.tfevents.00001", "events.out.tfevents.00002"]
    for path in checkpoints_of(folder)[-2:]:
        os.truncate(path, 1000)
    result = train(folder, WANTED)
    assert result.returncode == 0, result.stderr
    assert "Resuming after epoch 12 of" in result.stdout
    assert result_of(folder) == result_of(uninterrupted)
    check_complete(folder)
    assert event_files_of(folder) == ["events.out.tfevents.00003"]


def test_a_finished_run_is_extended(train, tmp_path):
    folder = tmp_path / "run"
    for num_epochs in (2, 5):
        result = train(folder, WANTED, f"trainer.epochs={num_epochs}")
        assert result.returncode == 0, result.stderr
        shown = check_complete(folder, num_epochs=num_epochs)
    assert [step for step, _ in shown.texts["configuration"]] == [0, 2]
    assert [step for step, *_ in shown.images["confusion_matrix/test"]] == [2, 5]
    (folder / "model.keras").unlink()  # the results are made again
    assert train(folder, WANTED, "trainer.epochs=5").returncode == 0
    assert check_complete(folder, num_epochs=5)[:3] == shown[:3]


def test_wanted_from_the_middle_on(train, tmp_path):
    folder = tmp_path / "run"
    train(folder, "trainer.epochs=3")
    assert not (folder / "tensorboard").exists()
    (folder / "tensorboard").touch()  # what is not wanted is not looked at
    assert train(folder, "trainer.epochs=4").returncode == 0
    result = train(folder, WANTED, "trainer.epochs=6")
    assert result.returncode == 2
    assert f"run_dir={folder}: tensorboard cannot be written: Not a directory" in result.stderr
    (folder / "tensorboard").unlink()
    assert train(folder, WANTED, "trainer.epochs=6").returncode == 0
    check_complete(folder, num_epochs=6)


def test_without_tensorboard(train, tmp_path):
    """TensorFlow no longer installs it; here it is hidden behind one that cannot be imported."""
    hidden = tmp_path / "hidden"
    for name in ("tensorboard", "tensorboard_data_server"):
        (hidden / name).mkdir(parents=True)
        (hidden / name / "__init__.py").write_text("raise ImportError('hidden')\n")
    path = os.pathsep.join([str(hidden), python_environment()["PYTHONPATH"]])
    result = train(tmp_path / "run", WANTED, env={"PYTHONPATH": path}, fresh=True)
    assert result.returncode == 0, result.stderr
    check_complete(tmp_path / "run")


def test_a_folder_that_cannot_be_written_ends_the_run_in_one_line(args, uninterrupted, train, start, tmp_path):
    folder, more = tmp_path / "run", (WANTED, "trainer.epochs=3")
    assert train(folder, *more).returncode == 0
    (folder / "tensorboard/events.out.tfevents.99999").touch()
    (folder / "tensorboard/events.out.tfevents.100000").symlink_to("/dev/full")
    result = train(folder, WANTED)
    assert result.returncode == 1
    assert result.stderr.startswith(
        f"error: {folder}/tensorboard cannot be written (No space left on device); what was"
    )
    assert result.stderr.count("\n") == 1
    shutil.rmtree(folder / "tensorboard")
    assert train(folder, WANTED).returncode == 0
    assert result_of(folder) == result_of(uninterrupted)
    check_complete(folder)
