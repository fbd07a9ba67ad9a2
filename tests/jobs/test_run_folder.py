"""A finished run whose folder was tampered with: rebuilt from the last checkpoint, or refused."""

import gc
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.job import NUM_EPOCHS, TRAIN
from support.runs import checkpoints_of, history_of, result_of, summary_of

from mnist_dist.base.errors import UserError
from mnist_dist.config.compose import compose_config
from mnist_dist.launch.job import Job
from mnist_dist.launch.topology import Topology
from mnist_dist.run.checkpoint import Checkpoint
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.input import RunInput, agree_on_input, read_input
from mnist_dist.run.summary import RESULT_FILES

MADE_AGAIN = f": made again from the checkpoint of epoch {NUM_EPOCHS}"
NO_CHECKPOINT = f"and no checkpoint of epoch {NUM_EPOCHS} to make that from is left"


# What is done to a folder; each takes the folder.


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def remove(*names):
    def damage(folder):
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def cut(name, share=0.5):
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * share))


def flip(name):
    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return damage


def in_place_of(name, make):
    """`make` (`Path.mkdir`, `os.mkfifo`) something in place of `name`."""

    def damage(folder):
        remove(name)(folder)
        make(folder / name)

    return damage


def summary_with(**changes):
    """`...` removes a key."""

    def damage(folder):
        values = {**summary_of(folder), **changes}
        text = json.dumps({key: value for key, value in values.items() if value is not ...})
        (folder / "summary.json").write_text(text)

    return damage


def history_of_epochs(number):
    def damage(folder):
        lines = (folder / "history.csv").read_text().splitlines()
        (folder / "history.csv").write_text("\n".join(lines[: number + 1]) + "\n")

    return damage


def without_newest(number=1):
    """That many of the newest checkpoints are gone."""
    return lambda folder: [path.unlink() for path in checkpoints_of(folder)[-number:]]


def as_of_an_earlier_version(folder):
    summary_with(files=...)(folder)
    config = (folder / "config.yaml").read_text()
    for lines in ("- augment: none\n", "augment:\n  name: none\n"):
        assert lines in config
        config = config.replace(lines, "")
    (folder / "config.yaml").write_text(config)


def nothing(folder):
    pass


@pytest.fixture
def folder(uninterrupted, tmp_path) -> Path:
    """A finished run, to be damaged."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def look(args, monkeypatch):
    """What training finds in a folder before TensorFlow is imported; None if the run is finished."""
    monkeypatch.setattr("sys.argv", ["train"])

    def look(folder, *more) -> RunInput | None:
        config = compose_config("strategy=single", *map(str, args), f"run_dir={folder}", *more)
        job = Job(Topology(), timeout_s=1)
        agreed = agree_on_input(read_input(config, job, RunFolder.from_config(config.run_dir)), job)
        return None if agreed.found.is_finished else agreed

    return look


@pytest.fixture
def refuse(look):
    """The line with which training refuses a folder, which stays unchanged."""

    def refuse(folder, *more) -> str:
        before = content_of(folder)
        with pytest.raises(UserError) as error:
            look(folder, *more)
        assert content_of(folder) == before
        line = str(error.value)
        del error
        gc.collect()  # the folder it refers to has the lock
        return line

    return refuse


def content_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WHOLE = {
    "whole": [nothing],
    "of an earlier version": [as_of_an_earlier_version],
    "no checkpoints": [remove("checkpoints")],
    "no newest checkpoint": [without_newest()],
    "no log": [remove("train.log")],
}


@pytest.mark.parametrize("name", WHOLE)
def test_finished(name, folder, look, logged):
    for damage in WHOLE[name]:
        damage(folder)
    before = content_of(folder)
    assert look(folder) is None
    assert look(folder, "trainer.epochs=3") is None
    assert logged() == []
    assert content_of(folder) == before


REBUILT = {
    "no model": ([remove("model.keras")], "model.keras is missing"),
    "empty model": ([write("model.keras", b"")], "model.keras is damaged (it is empty)"),
    "cut model": ([cut("model.keras")], "model.keras is damaged (its SHA-256 is not that in summary.json)"),
    "changed model": ([flip("model.keras")], "model.keras is damaged (its SHA-256 is not that in summary.json)"),
    "earlier version, cut model": (
        [as_of_an_earlier_version, cut("model.keras")],
        "model.keras is damaged (it is not an archive written by Keras, or its end is missing)",
    ),
    "earlier version, changed model": (
        [as_of_an_earlier_version, flip("model.keras")],
        "model.keras is damaged (model.weights.h5 in it does not have the checksum that was written with it)",
    ),
    "no picture": ([remove("plots/loss.png")], "plots/loss.png is missing"),
    "cut picture": ([cut("plots/accuracy.png")], "plots/accuracy.png is damaged (its SHA-256 is not that in summary"),
    "earlier version, cut picture": (
        [as_of_an_earlier_version, cut("plots/accuracy.png")],
        "plots/accuracy.png is damaged (it is not a complete PNG file)",
    ),
    "no pictures": ([remove("plots")], "plots/loss.png is missing, plots/accuracy.png is missing, plots/confusion_"),
    "no history": ([remove("history.csv")], "history.csv is missing"),
    "empty history": ([write("history.csv", b"")], "history.csv is damaged (it is empty)"),
    "binary history": ([write("history.csv", b"\xff")], "history.csv is damaged ('utf-8' codec can't decode"),
    "cut history": ([cut("history.csv")], "history.csv is damaged (expected 9 values; got "),
    "short history": ([history_of_epochs(3)], "history.csv is damaged (it does not agree with the newest checkpoint)"),
    "changed history": ([flip("history.csv")], "history.csv is damaged ("),
    "no config": ([remove("config.yaml")], "config.yaml is missing"),
    "empty config": ([write("config.yaml", b"")], "config.yaml is damaged (it is empty)"),
    "binary config": ([write("config.yaml", b"\xff")], "config.yaml is damaged ('utf-8' codec can't decode"),
    "a list as config": ([write("config.yaml", b"- 1")], "config.yaml is damaged (it is not a configuration)"),
    "deep config": ([write("config.yaml", b"[" * 99_999)], "config.yaml is damaged (maximum recursion depth"),
    "cut config": ([cut("config.yaml", 0.6)], "config.yaml is damaged"),
    "no summary": ([remove("summary.json")], "summary.json is missing"),
    "empty summary": ([write("summary.json", b"")], "summary.json is damaged (it is empty)"),
    "cut summary": ([cut("summary.json")], "summary.json is damaged ("),
    "binary summary": ([write("summary.json", b"\xff\xfe{")], "summary.json is damaged ('utf-16-le' codec can't"),
    "a list as summary": ([write("summary.json", b"[1]")], "summary.json is damaged (it is [1], not an object)"),
    "deep summary": ([write("summary.json", b"[" * 99_999)], "summary.json is damaged (it is nested too deep)"),
    "NaN": ([summary_with(variance_percent=float("nan"))], "summary.json is damaged (it has NaN for a number)"),
    **{
        f"epochs {value!r}": ([summary_with(epochs_completed=value)], f"summary.json is damaged ({problem}")
        for value, problem in [
            (..., "it has no epochs_completed"),
            (str(NUM_EPOCHS), "epochs_completed is '40'"),
            (40.0, "epochs_completed is 40.0"),
            (True, "epochs_completed is True"),
            (-1, "its status is 'finished' after -1 epochs"),
        ]
    },
    "status": ([summary_with(status="running")], "summary.json is damaged (its status is 'running' after 40 epochs)"),
    "no dataset": ([summary_with(dataset=...)], "summary.json is damaged (it has no dataset)"),
    "dataset": ([summary_with(dataset="small")], "summary.json is damaged (dataset is 'small', not an object)"),
    "test": ([summary_with(test={"loss": 0})], "summary.json is damaged (it has no accuracy)"),
    "files": ([summary_with(files=[])], "summary.json is damaged (files is [], not an object)"),
    "digests": ([summary_with(files={"model.keras": 5})], "summary.json is damaged (model.keras is 5)"),
    "weights": ([summary_with(weights_sha256="0" * 64)], "summary.json is damaged (its weights are not those of epoch"),
    "two": ([remove("model.keras"), write("summary.json", b"")], "summary.json is damaged (it is empty)"),
}


@pytest.mark.parametrize("name", REBUILT)
def test_made_again(name, folder, look, logged):
    damages, problem = REBUILT[name]
    for damage in damages:
        damage(folder)
    before = content_of(folder)
    run_input = look(folder)
    assert run_input.found.checkpoint.point.epoch == NUM_EPOCHS
    (warning,) = logged()
    assert warning.startswith(problem)
    assert warning.endswith(MADE_AGAIN)
    assert content_of(folder) == before  # until there is something better


REFUSED = {
    "plots a file": ([in_place_of("plots", Path.touch)], "plots cannot be written: Not a directory"),
    "checkpoints a file": ([in_place_of("checkpoints", Path.touch)], "checkpoints cannot be written: Not a directory"),
    "plots a link to nowhere": (
        [in_place_of("plots", lambda path: path.symlink_to("gone"))],
        "is a link to gone: No such file or directory",
    ),
    **{
        f"{kind} {name}": ([in_place_of(name, make)], f"{name} is not a regular file; move it away")
        for kind, make in (("folder", Path.mkdir), ("pipe", os.mkfifo))
        for name in ("config.yaml", "train.log", "history.csv", "summary.json", *RESULT_FILES)
    },
    "no model, no checkpoints": ([remove("model.keras", "checkpoints")], f"model.keras is missing, {NO_CHECKPOINT}; "),
    "cut model, no newest checkpoint": (
        [cut("model.keras"), without_newest()],
        f"{NO_CHECKPOINT} (the newest is of epoch {NUM_EPOCHS - 1})",
    ),
    "no history, no checkpoints": (
        [remove("history.csv", "checkpoints")],
        f"summary.json has {NUM_EPOCHS} epochs, history.csv none, the newest checkpoint is missing",
    ),
    "empty summary, no checkpoints": (
        [write("summary.json", b""), remove("checkpoints")],
        "summary.json is damaged (it is empty), and no checkpoint to make that from is left",
    ),
    "no summary, no checkpoints": (
        [remove("summary.json", "checkpoints")],
        "summary.json is missing, and no checkpoint to make that from is left",
    ),
    "empty config, no checkpoints": (
        [write("config.yaml", b""), remove("checkpoints")],
        "config.yaml is damaged (it is empty), so it is unknown which run this is",
    ),
    "no config, no checkpoints": (
        [remove("config.yaml", "checkpoints")],
        "is not a run folder (it has no config.yaml)",
    ),
    "99 epochs": (
        [summary_with(epochs_completed=99)],
        f"summary.json has 99 epochs, history.csv {NUM_EPOCHS}, the newest checkpoint {NUM_EPOCHS}; put back what",
    ),
    "history and checkpoints of fewer": (
        [history_of_epochs(NUM_EPOCHS - 1), without_newest(2)],
        f"has {NUM_EPOCHS} epochs, history.csv {NUM_EPOCHS - 1}, the newest checkpoint {NUM_EPOCHS - 2}; put back what",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, folder, refuse):
    damages, problem = REFUSED[name]
    for damage in damages:
        damage(folder)
    assert problem in refuse(folder)


def test_more_epochs_than_checkpoint_and_history_do_not_resume(folder, refuse):
    summary_with(epochs_completed=99)(folder)
    line = refuse(folder, "trainer.epochs=100")
    assert f"summary.json has 99 epochs, history.csv {NUM_EPOCHS}, the newest checkpoint {NUM_EPOCHS}; put" in line


def test_a_run_that_was_extended_and_killed(folder, look, refuse, logged):
    """The summary is of fewer epochs, whose checkpoint is gone; their results may be intact or not."""
    weights_sha256 = history_of(folder).epochs[2].weights_sha256
    summary_with(epochs_completed=3, weights_sha256=weights_sha256)(folder)
    assert look(folder, "trainer.epochs=3") is None
    flip("model.keras")(folder)  # or the first of the later results, if it was killed then
    line = refuse(folder, "trainer.epochs=3")
    assert f"was since trained to epoch {NUM_EPOCHS}; give trainer.epochs={NUM_EPOCHS} for its results" in line
    assert look(folder).found.checkpoint.point.epoch == NUM_EPOCHS
    assert logged() == []


def test_lost_results_of_more_epochs_are_not_replaced_by_those_of_fewer(folder, refuse):
    remove("summary.json")(folder)
    without_newest()(folder)
    line = refuse(folder, f"trainer.epochs={NUM_EPOCHS - 1}")
    assert line.startswith(f"trainer.epochs={NUM_EPOCHS - 1}: the run in {folder} already has {NUM_EPOCHS}; ")


def change_checkpoint(folder, **changes):
    path = checkpoints_of(folder)[-1]
    checkpoint = Checkpoint.from_bytes(path.read_bytes())
    training = {**checkpoint.point.fingerprint, **changes}
    path.write_bytes(replace(checkpoint, point=replace(checkpoint.point, fingerprint=training)).to_bytes())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"seed": "1"}, "seed was 1, is now 0"),
        ({"data.sha256": "f" * 64}, "the data was ffffffffffff..., is now "),
        ({"model.name": "cnn", "model.dense_size": "9"}, "model.dense_size was 9, is now None; model.name was cnn, is"),
        ({"precision.name": "mixed_bfloat16"}, "precision.name was mixed_bfloat16, is now float32"),  # auto in ours
    ],
)
def test_a_checkpoint_of_another_run(changes, problem, folder, refuse):
    change_checkpoint(folder, **changes)
    for epochs in (NUM_EPOCHS, NUM_EPOCHS + 1):
        line = refuse(folder, f"trainer.epochs={epochs}")
        assert f"the newest checkpoint does not belong to the run here ({problem}" in line
    assert "holds a run of another configuration (seed was 0, is now 1); name" in refuse(folder, "seed=1")


@pytest.mark.parametrize("damage", [nothing, remove("checkpoints"), remove("summary.json"), cut("config.yaml", 0.3)])
def test_another_configuration(damage, folder, refuse):
    damage(folder)
    line = refuse(folder, "optimizer=sgd", "batch.num_shards=4")
    assert "holds a run of another configuration (batch.num_shards was 8, is now 4; optimizer.beta_1 was 0.9, " in line


def test_a_checkpoint_of_the_same_run_with_more_epochs_resumes(folder, train, look, logged):
    """From another folder, with other times."""
    other = folder.with_name("other")
    assert train(other, f"trainer.epochs={NUM_EPOCHS + 2}").returncode == 0
    shutil.copy(checkpoints_of(other)[-1], folder / "checkpoints")
    run_input = look(folder, f"trainer.epochs={NUM_EPOCHS + 2}")
    assert run_input.found.checkpoint.point.epoch == NUM_EPOCHS + 2
    assert logged()[0].startswith("history.csv is damaged (it does not agree with the newest checkpoint): made again")


def test_a_checkpoint_without_a_part_of_the_state(folder, train):
    path = checkpoints_of(folder)[-1]
    checkpoint = Checkpoint.from_bytes(path.read_bytes())
    state = {name: value for name, value in checkpoint.state.items() if name != "good_steps"}
    path.write_bytes(replace(checkpoint, state=state).to_bytes())
    result = train(folder, f"trainer.epochs={NUM_EPOCHS + 1}")
    assert (result.returncode, result.stderr) == (
        2,
        "error: the checkpoint to resume from lacks the good_steps that this version of the package needs; "
        "name another run_dir\n",
    )


# The commands themselves


def damage_all(folder):
    remove("config.yaml", "model.keras", "plots")(folder)
    flip("history.csv")(folder)
    write("summary.json", b"\xff")(folder)


def test_everything_is_made_again(folder, uninterrupted, train, logged):
    damage_all(folder)
    result = train(folder)
    assert (result.returncode, result.stderr) == (0, "")
    warnings = [line for line in result.stdout.splitlines() if line.endswith(MADE_AGAIN)]
    assert len(warnings) == 1
    assert "Epoch " not in result.stdout
    assert result_of(folder) == result_of(uninterrupted)
    assert {path.name for path in folder.iterdir()} == {path.name for path in uninterrupted.iterdir()}
    assert set(summary_of(folder)["files"]) == set(RESULT_FILES)
    result = train(folder, script=("-X", "importtime", *TRAIN), fresh=True)
    assert result.returncode == 0
    assert "finished: nothing to do" in result.stdout
    assert not any(line.endswith((" tensorflow", " keras", " matplotlib")) for line in result.stderr.splitlines())


def test_fewer_epochs_than_it_has_make_all_of_them_again(folder, uninterrupted, train):
    remove("model.keras")(folder)
    result = train(folder, "trainer.epochs=2")
    assert result.returncode == 0, result.stderr
    assert f"model.keras is missing{MADE_AGAIN}\n" in result.stdout
    assert result_of(folder) == result_of(uninterrupted)
    assert f"  epochs: {NUM_EPOCHS}\n" in (folder / "config.yaml").read_text()


def test_several_processes(folder, uninterrupted, run_job, args):
    """The chief decides whether to rebuild, that there is nothing to do, or that it cannot be done."""
    command = (("multiworker", 2), *args, f"run_dir={folder}")
    damage_all(folder)
    for message in (MADE_AGAIN, "finished: nothing to do"):
        chief, other = run_job(*command)
        assert (chief.returncode, other.returncode) == (0, 0), chief.stderr + other.stderr
        assert message in chief.stdout
        assert other.stdout == ""
        assert result_of(folder) == result_of(uninterrupted)
    remove("model.keras", "checkpoints")(folder)
    chief, other = run_job(*command)
    assert (chief.returncode, other.returncode) == (2, 2)
    assert f"model.keras is missing, {NO_CHECKPOINT}" in chief.stderr
    assert "rank 0 cannot take part: " in other.stderr


def test_refused_in_one_line(folder, train):
    remove("model.keras", "checkpoints")(folder)
    before = content_of(folder)
    result = train(folder)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: run_dir={folder}: model.keras is missing, {NO_CHECKPOINT}; ")
    assert len(result.stderr.splitlines()) == 1
    assert content_of(folder) == before


def test_a_link_to_the_folder(folder, train, uninterrupted):
    link = folder.with_name("link")
    link.symlink_to(folder.name)
    remove("model.keras", "summary.json")(folder)
    without_newest()(folder)
    result = train(link)
    assert result.returncode == 0, result.stderr
    assert f"Resuming after epoch {NUM_EPOCHS - 1} of {NUM_EPOCHS}" in result.stdout
    assert link.is_symlink()
    assert result_of(folder) == result_of(uninterrupted)
