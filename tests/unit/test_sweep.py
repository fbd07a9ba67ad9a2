"""Search spaces, what a sweep asks for next, and what it makes of what it finds; nothing is trained."""

import dataclasses
import errno
import fcntl
import html
import os
import re
import shlex
import sys

import numpy as np
import optuna
import pytest
from support.trials import leave_history, leave_results

from mnist_dist.base.console import Console
from mnist_dist.base.errors import EnvironmentFailed, UserError
from mnist_dist.cli.command_line import parse_command_line
from mnist_dist.cli.main import DOCTOR_HINT
from mnist_dist.cli.multirun import expand
from mnist_dist.config.compose import compose, conf_dir, to_config
from mnist_dist.config.search_space import Choice, Interval, Range, parse_dimension, parse_space, read_space
from mnist_dist.launch.child import Signals
from mnist_dist.launch.topology import Topology
from mnist_dist.report.sweep_page import build_sweep_page
from mnist_dist.run import sweep_folder as sweep_module
from mnist_dist.run.events import Event
from mnist_dist.run.inspection import Inspection
from mnist_dist.run.sweep_folder import Attempt, SweepFolder, SweepPlan, Trial, read_sweep
from mnist_dist.sweep import training
from mnist_dist.sweep.__main__ import find_folder, open_sweep, sweep, write_report
from mnist_dist.sweep.config import SWEEP
from mnist_dist.sweep.outcome import LOST, STOPPED, end_attempt, expect_stop, judge
from mnist_dist.sweep.plan import build_search, check_same
from mnist_dist.sweep.study import STUDY_NAME, Study

# The search space


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("interval(1e-4,1e-2), log", Interval(1e-4, 1e-2, is_log=True)),
        ("tag(log, interval(1e-4,1e-2))", Interval(1e-4, 1e-2, is_log=True)),
        ("interval(0, 1)", Interval(0.0, 1.0)),
        ("int(interval(1,512)),log", Interval(1, 512, is_log=True)),
        ("tag(log, int(interval(1,512)))", Interval(1, 512, is_log=True)),
        ("range(1,10,3)", Range((1, 4, 7))),
        ("range(0.0,0.5,0.1)", Range((0.0, 0.1, 0.2, 0.3, 0.4))),
        ("range(3,0,-1)", Range((1, 2, 3))),
        ("adam,sgd", Choice(("adam", "sgd"), ("adam", "sgd"))),
        ("choice([64,64],[128])", Choice(([64, 64], [128]), ("[64,64]", "[128]"))),
        ("null,'a b',true", Choice((None, "a b", True), ("null", "'a b'", "True"))),
        ("choice(cnn)", Choice(("cnn",), ("cnn",))),
        ("1,log", Choice((1, "log"), ("1", "log"))),
        ("shuffle(choice(2,1))", Choice((2, 1), ("2", "1"))),  # the same every time
    ],
)
def test_hydras_grammar(text, expected):
    found = parse_dimension("model.dropout", text)
    assert found == expected
    assert not isinstance(found, Interval) or found.is_int == isinstance(expected.low, int)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0.5", "expected several values"),
        ("", "expected several values"),
        ("glob(*)", "expected several values"),
        ("choice()", "cannot be read"),
        ("interval(1)", "cannot be read"),
        ("interval(1,inf)", "both ends must be numbers"),
        ("interval(nan,1)", "both ends must be numbers"),
        ("interval(2,1)", "the first number must be less"),
        ("interval(1,1)", "the first number must be less"),
        ("interval(0,1), log", "with log the first number must be more than 0"),
        ("tag(log, int(interval(-1,1)))", "with log the first number must be more than 0"),
        ("tag(exp, interval(1,2))", "exp: the only tag is log"),
        ("tag(log, choice(1,2))", "log: goes with interval"),
        ("interval(1,2), linear", "values cannot be mixed"),
        ("interval(1,2),interval(3,4)", "values cannot be mixed"),
        ("range(1,1)", "has no values"),
        ("range(1,5,0)", "must not be zero"),
        ("range(nan,1)", "cannot be read"),
        ("range(0,1e12)", "more than 1000 values"),
        ("a,b,a", "given twice"),
        ("a\nb,c", "cannot be read"),
        ("(" * 5000, "cannot be read"),
        ("[" * 3000, "cannot be read"),
        ("9" * 5000 + ",1", "digits"),
        ("choice(1,2", "cannot be read"),
        ("a;rm -rf /,b", "cannot be read"),
    ],
)  # fmt: skip
def test_a_text_that_cannot_be_searched(text, problem):
    with pytest.raises(UserError) as raised:
        parse_space({"model.dropout": text})
    message = str(raised.value)
    assert message.startswith("model.dropout: ")
    assert problem in message
    assert len(message) < 700


@pytest.mark.parametrize("key", ["", "+seed", "++seed", "~seed", "seed@x", "a b", "a=b", "seed\n"])
def test_what_is_not_a_key(key):
    with pytest.raises(UserError):
        parse_space({key: "1,2"})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read: No such file"),
        (b"", "expected lines KEY: VALUES"),
        (b"- a\n- b\n", "expected lines KEY: VALUES"),
        (b"just words\n", "just words: None: expected several values"),
        (b"seed: [1,2]\n", "seed: [1, 2]: expected several values"),
        (b"seed: 3\n", "seed: 3: expected several values"),
        (b"seed:\n", "seed: None: expected several values"),
        (b"model:\n  dropout: 0.1,0.2\n", "write model.NAME: VALUES"),
        (b"seed: 1,2\nseed: 3,4\n", "cannot be read as YAML"),
        (b"seed: 'a\n", "cannot be read as YAML"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
        (b"a: !!python/object/apply:os.system ['true']\n", "cannot be read as YAML"),
    ],
)
def test_a_file_that_is_no_search_space(content, problem, tmp_path):
    path = tmp_path / "space.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"^space=") as raised:
        read_space(str(path))
    assert problem in str(raised.value)


# The plan


@pytest.fixture
def search_for(small_npz):
    """What `python -m mnist_dist.sweep` would search for."""
    return lambda *overrides: search(f"data.path={small_npz}", "data=npz", *overrides)


def search(*overrides):
    typed = parse_command_line(overrides, command="sweep")
    return build_search(to_config(SWEEP, compose(SWEEP, typed.overrides, config_dir=typed.config_dir)), typed)


@pytest.fixture
def space_file(tmp_path):
    """Write a search space; returns `space=FILE`."""

    def write(*lines):
        path = tmp_path / "my space.yaml"
        path.write_text("\n".join(lines) + "\n")
        return f"space='{path}'"

    return write


@pytest.mark.parametrize("path", sorted((conf_dir() / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_search_spaces_here(path, search_for):
    search = search_for(f"space={path.stem}")
    assert search.plan.space.keys() == search.space.keys()
    assert not search.plan.training.keys() & search.space.keys()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("model.droput: 0.1,0.2", "model.droput: 0.1,0.2: model.droput: no such key"),
        ("num_trials: 1,2", "no such key"),
        ("model.dropout: interval(0,1.5)", "model.dropout: interval(0,1.5): model.dropout=1.5: must be from 0"),
        ("model.dropout: range(-1,1)", "model.dropout=-1.0: must be from 0"),
        ("model.activation: relu,rleu", "model.activation=rleu: must be relu"),
        ("batch.global_size: interval(8,64)", "must be a whole number; write int(interval(8,64))"),
        ("optimizer: adam,foo", "optimizer=foo: no such choice; choose one of adam, adamw, sgd"),
        ("optimizer: ../optimizer/adam,sgd", "no such choice"),
        ("hydra.run.dir: a,b", "cannot be changed"),
        ("run_dir: a,b", "run_dir: cannot vary"),
        ("threads.intra_op: 1,2", "threads.intra_op: cannot vary"),
        ("strategy: single,foo", "strategy=foo: no such choice"),
    ],
)
def test_a_space_that_could_not_be_trained_is_refused(line, problem, space_file, search_for):
    with pytest.raises(UserError, match=r"^space=.*my space\.yaml: ") as raised:
        search_for(space_file("seed: 1,2", line))
    assert problem in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["run_dir=x"], "run_dir=x: each trial has its own"),
        (["resume=never"], "resume=never: a sweep continues its trials"),
        (["space=nowhere"], "space=nowhere: no such search space; choose one of cnn, mlp, optimizer"),
        (["space=mlp", "model.dropout=0.1"], "space=mlp: model.dropout=0.1: the search space varies this key"),
        (["space=mlp", "sampler=grid"], "sampler=grid: optimizer.learning_rate is an interval"),
        (["num_trials=0"], "num_trials=0: must be from 1"),
        (["sampler=cma"], "sampler=cma: must be tpe, random or grid"),
        (["sweep=mlp"], "sweep=mlp: cannot be changed on the command line"),
    ],
)
def test_a_command_that_is_refused(arguments, line, search_for):
    with pytest.raises(UserError) as raised:
        search_for(*arguments)
    assert str(raised.value).startswith(line)


def test_a_choice_need_not_go_with_all_others(space_file, search_for):
    """Only sgd has a momentum; what goes with nothing is refused, the rest is for the trials to find out."""
    search = search_for(space_file("optimizer: adam,sgd", "optimizer.momentum: 0.0,0.9"))
    assert "optimizer.name" not in search.plan.training
    assert search.plan.training["trainer.epochs"] == "150"


def test_a_value_need_not_go_with_the_defaults(space_file, search_for):
    """nesterov needs a momentum, which is 0 by default."""
    lines = ["optimizer: choice(sgd)", "optimizer.nesterov: true,false"]
    search_for(space_file(*lines, "optimizer.momentum: choice(0.0,0.9)"))
    with pytest.raises(UserError, match=r"optimizer\.nesterov=True: needs optimizer\.momentum greater than 0"):
        search_for(space_file(*lines, "optimizer.momentum: choice(0.0)"))


def test_what_varies_with_a_choice_is_not_what_trials_have_in_common(space_file, search_for):
    both = search_for(space_file("optimizer: adam,sgd")).plan.training
    assert not any(key.startswith("optimizer.") for key in both)
    fixed = search_for(space_file("optimizer: adam,sgd"), "optimizer.learning_rate=0.5").plan.training
    assert fixed == {**both, "optimizer.learning_rate": "0.5"}


def test_the_trainings_get_what_is_theirs(space_file, search_for):
    arguments = ["trainer.epochs=3", "sweep_dir=x", "num_trials=7", "jobs=2", "console.tensorflow_messages=true"]
    plan = search_for(space_file("seed: range(5)"), "sampler=grid", *arguments).plan
    assert plan.overrides[2:] == ("trainer.epochs=3", "console.tensorflow_messages=true")
    assert plan.num_trials == 5  # the grid has no more


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sampler": "random"}, "sampler was tpe, is now random"),
        ({"pruner": "median"}, "pruner was none, is now median"),
        ({"seed": 5}, "seed was 0, is now 5"),
        ({"space": {"seed": "1,3"}}, "space: seed was 1,2, is now 1,3"),
        ({"space": {"seed": "1,2", "model.dropout": "0,1"}}, "space: model.dropout was not given, is now 0,1"),
        ({"training": {"trainer.epochs": "4"}}, "trainer.epochs was 3, is now 4"),
    ],
)
def test_another_sweep_in_the_same_folder_is_refused(change, words):
    with pytest.raises(UserError, match=f"^sweep_dir=here: holds another sweep \\({words}\\)"):
        check_same(PLAN, dataclasses.replace(PLAN, **change), path="here")


def test_a_sweep_of_an_earlier_version_has_the_defaults_of_newer_keys():
    earlier = dataclasses.replace(PLAN, training={"seed": "0"})
    now = dataclasses.replace(PLAN, training={"seed": "0", "loss.label_smoothing": "0.0"})
    check_same(earlier, now, path="here")
    with pytest.raises(UserError, match=r"loss.label_smoothing was 0.0, is now 0.1"):
        check_same(
            earlier, dataclasses.replace(now, training={"seed": "0", "loss.label_smoothing": "0.1"}), path="here"
        )


def test_a_rule_for_an_early_end_is_part_of_a_sweep(search_for, space_file):
    one, other = (search_for(space_file("seed: 1,2"), *more).plan for more in ((), ("trainer.patience=3",)))
    assert other.training == {**one.training, "trainer.patience": "3"}


def test_what_may_differ_in_the_same_folder():
    check_same(PLAN, dataclasses.replace(PLAN, num_trials=9, max_attempts=9, overrides=("report=false",)), path="here")


PLAN = SweepPlan(
    space={"seed": "1,2"}, sampler="tpe", pruner="none", seed=0, num_trials=4, max_attempts=3,
    training={"trainer.epochs": "3"}, overrides=(),
)  # fmt: skip
SPACE = {
    "optimizer": "adam,sgd",
    "optimizer.learning_rate": "interval(1e-4,1e-1), log",
    "model.dropout": "range(0.0,0.6,0.1)",
    "batch.global_size": "int(interval(16,256))",
}


def test_other_data_make_it_another_sweep(space_file, search_for, small_arrays, tmp_path):
    """Which `data=auto` may find on another machine, or a file that was replaced."""
    ours = search_for(space_file("seed: 1,2")).plan
    np.savez(tmp_path / "other.npz", **{**small_arrays, "y_train": small_arrays["y_train"][::-1]})
    theirs = search_for(space_file("seed: 1,2"), f"data.path={tmp_path}/other.npz").plan
    with pytest.raises(UserError, match=r"data\.sha256 was [0-9a-f]{64}, is now [0-9a-f]{64}\)"):
        check_same(theirs, ours, path="here")
    varied = search_for(space_file("data.val_fraction: 0.1,0.2")).plan
    assert "data.sha256" not in varied.training


# The study


class Played:
    """A sweep whose trainings take no time: their accuracy is a function of their values."""

    def __init__(self, path, *, space=SPACE, **options) -> None:
        self.plan = dataclasses.replace(PLAN, space=space, **options)
        self.folder = SweepFolder(path)
        self.trials: list[Trial] = []
        with self.folder.locked(may_be_new=True):
            self.folder.write_plan(self.plan)
            self.folder.make_trials()
        self.study = self.reopen()

    def reopen(self) -> Study:
        self.study = Study(self.folder.journal_path, self.plan, parse_space(self.plan.space), self.history)
        return self.study

    def history(self, trial):
        path = self.folder.run_dir(trial.number)
        return Inspection(path).read_history(None)

    def ask(self) -> Trial:
        self.trials.append(self.study.ask(self.trials))
        return self.trials[-1]

    def finish(self, number: int, accuracies, state="finished") -> Trial:
        leave_results(self.folder.run_dir(number), accuracies)
        pruned_after = self.study.report(self.trials, number)
        value = None if pruned_after else accuracies[-1]
        ended = dataclasses.replace(
            self.trials[number], state="pruned" if pruned_after else state, value=value, pruned_after_epoch=pruned_after
        )
        self.study.tell(self.trials, ended)
        self.trials[number] = ended
        return ended

    def play(self, num_trials: int) -> list[Trial]:
        while len(self.trials) < num_trials:
            trial = self.ask()
            rate = trial.params.get("optimizer.learning_rate", 0.5)
            best = 1 - abs(rate - 0.01) * 9 - 0.05 * (trial.params.get("optimizer") == "sgd")
            self.finish(trial.number, [best / 3, best / 2, best])
        return self.trials

    def in_journal(self) -> list[optuna.trial.FrozenTrial]:
        """As any other program of Optuna reads it."""
        backend = optuna.storages.journal.JournalFileBackend(str(self.folder.journal_path))
        storage = optuna.storages.JournalStorage(backend)
        return optuna.load_study(study_name=STUDY_NAME, storage=storage).trials


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_one_worker_gives_the_same_trials_twice(sampler, tmp_path):
    space = {"seed": "range(5)", "optimizer": "adam,sgd", "model.dropout": "0,0.5"} if sampler == "grid" else SPACE
    first = Played(tmp_path / "a", sampler=sampler, space=space).play(14)
    again = Played(tmp_path / "b", sampler=sampler, space=space)
    while len(again.trials) < 14:  # asked by another process each time
        again.play(len(again.trials) + 1)
        again.reopen()
    assert again.trials == first
    assert len({trial.overrides for trial in first}) > 10
    if sampler != "grid":
        other = Played(tmp_path / "c", sampler=sampler, seed=1).play(2)
        assert other[0].overrides != first[0].overrides


def test_tpe_learns(tmp_path):
    """Unlike the first ones, drawn at random, later trials have a good learning rate."""
    rates = [trial.params["optimizer.learning_rate"] for trial in Played(tmp_path).play(40)]
    good = [0.002 < rate < 0.03 for rate in rates]
    assert sum(good[20:]) > 2 * sum(good[:20])


def test_a_grid_has_every_point_once(tmp_path):
    space = {"seed": "range(3)", "optimizer": "adam,sgd"}
    trials = Played(tmp_path, sampler="grid", space=space).play(6)
    assert [trial.params for trial in trials] == [
        {"seed": seed, "optimizer": optimizer} for seed in range(3) for optimizer in ("adam", "sgd")
    ]


def test_values_are_those_of_the_space_and_of_the_texts(tmp_path):
    for trial in Played(tmp_path, sampler="random").play(20):
        read_back = {key: parse_dimension(key, f"choice({text})").values[0] for key, text in trial.texts.items()}
        assert read_back == trial.params
        assert trial.params["model.dropout"] in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
        assert isinstance(trial.params["batch.global_size"], int)


def torn(content: bytes) -> bytes:
    """As a kill in the middle of a write leaves it."""
    return content[:-7]


def behind(content: bytes) -> bytes:
    return b"".join(content.splitlines(keepends=True)[:-6])


def ahead(content: bytes) -> bytes:
    """A trial was asked for, and no record of it written."""
    return content + content.splitlines(keepends=True)[1]


def of_other_values(content: bytes) -> bytes:
    return content.replace(b'"param_value_internal":0', b'"param_value_internal":1')


DAMAGES = {
    "missing": None, "empty": lambda _: b"", "torn": torn, "behind": behind, "ahead": ahead,
    "text": lambda _: b"hello\n",
    "binary": lambda c: c[:100] + os.urandom(500) + c[100:], "first line lost": lambda c: c[c.index(b"\n") + 1 :],
    "other values": of_other_values,
}  # fmt: skip


@pytest.mark.parametrize("in_same_process", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_journal_is_made_again(damage, in_same_process, tmp_path):
    expected = Played(tmp_path / "whole").play(8)
    sweep = Played(tmp_path / "damaged")
    sweep.play(6)
    before = sweep.in_journal()
    journal = sweep.folder.journal_path
    change = DAMAGES[damage]
    content = journal.read_bytes()
    journal.unlink() if change is None else journal.write_bytes(change(content))
    assert change is None or journal.read_bytes() != content
    if not in_same_process or damage == "other values":  # what a process knows it does not read again
        sweep.reopen()
    assert sweep.play(8) == expected
    after = sweep.in_journal()
    for old, new, trial in zip(before, after, sweep.trials, strict=False):
        assert (old.params, old.values, old.state) == (new.params, new.values, new.state)
        assert old.intermediate_values == new.intermediate_values
        assert new.number == trial.number
    assert len(after) == 8


def test_a_report_that_was_torn_is_made_again(tmp_path):
    """All that is whole agrees with the records, but whoever adds a line would spoil it."""
    sweep = compared(tmp_path, "none")
    leave_history(sweep.folder.run_dir(6), GOOD[:4])
    sweep.study.report(sweep.trials, 6)
    with sweep.folder.journal_path.open("ab") as stream:
        stream.write(b'{"op_code":7,"worker_id":"x","trial_id":6,"st')
    leave_history(sweep.folder.run_dir(6), GOOD)
    sweep.study.report(sweep.trials, 6)
    assert sweep.in_journal()[6].intermediate_values == dict(enumerate(GOOD, start=1))


def test_the_journal_was_made_again_by_another_worker(tmp_path):
    """It has the same trials as before, but at other places of the file, which has grown since."""
    one, other = compared(tmp_path, "none"), Played(tmp_path, pruner="none", training={"trainer.epochs": "6"})
    size = one.folder.journal_path.stat().st_size
    one.folder.journal_path.unlink()
    leave_history(one.folder.run_dir(6), [0.5] * 200)
    other.study.report(one.trials, 6)
    assert one.folder.journal_path.stat().st_size > size
    one.ask()
    assert [trial.number for trial in one.in_journal()] == list(range(8))
    assert len(one.in_journal()[6].intermediate_values) == 200


def test_the_journal_follows_a_record_that_changed(tmp_path):
    """The results of a finished trial were lost, so that it is trained again."""
    sweep = Played(tmp_path)
    sweep.play(3)
    sweep.trials[1] = dataclasses.replace(sweep.trials[1], state="waiting", value=None)
    sweep.ask()
    states = [trial.state.name for trial in sweep.in_journal()]
    assert states == ["COMPLETE", "RUNNING", "COMPLETE", "RUNNING"]


GOOD, BAD = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95], [0.5, 0.6, 0.3, 0.2, 0.9, 0.99]


def compared(path, pruner: str) -> Played:
    """A sweep with enough good trials to compare others with."""
    sweep = Played(path, pruner=pruner, training={"trainer.epochs": "6"})
    for number in range(6):
        sweep.ask()
        sweep.finish(number, GOOD)
    sweep.ask()
    return sweep


@pytest.mark.parametrize(("pruner", "pruned_after"), [("median", 3), ("percentile", 3), ("none", None)])
@pytest.mark.parametrize("seen", [range(1, 7), [6], [1, 5, 6], [4, 4, 6]], ids=str)
def test_a_trial_is_pruned_after_the_same_epoch_however_fast_it_is(pruner, pruned_after, seen, tmp_path):
    sweep = compared(tmp_path, pruner)
    for num_epochs in seen:
        leave_history(sweep.folder.run_dir(6), BAD[:num_epochs])
        found = sweep.reopen().report(sweep.trials, 6)
        if found:
            break
    assert found == pruned_after
    reported = sweep.in_journal()[6].intermediate_values
    assert reported == dict(enumerate(BAD[:pruned_after], start=1))


def test_a_pruned_trial_stays_pruned_in_a_journal_that_is_made_again(tmp_path):
    sweep = compared(tmp_path, "median")
    assert sweep.finish(6, BAD).state == "pruned"
    before = sweep.in_journal()[6]
    sweep.folder.journal_path.unlink()
    sweep.ask()
    after = sweep.in_journal()[6]
    assert (before.state, before.value, before.intermediate_values) == (
        after.state, after.value, after.intermediate_values,
    )  # fmt: skip


# What becomes of a trial


def attempt(from_epoch=0, reached=0, code=-9, reason="killed"):
    return Attempt(1.0, "node7", from_epoch, 2.0, reached, code, reason)


def event(kind, **more):
    return Event(kind=kind, time=1.0, epoch=3, **more)


@pytest.mark.parametrize(
    ("attempts", "facts", "state", "reason"),
    [
        ([], {}, "waiting", ""),
        ([attempt(code=0, reason="")], {"value": 0.5}, "finished", ""),
        ([attempt()], {"value": 0.5}, "finished", ""),  # killed after the last write
        ([attempt()], {}, "waiting", "killed"),
        ([attempt(), attempt()], {}, "waiting", "killed"),
        ([attempt(), attempt(), attempt(reason="out of memory")], {}, "failed", "out of memory (tried 3 times"),
        ([attempt(), attempt(), attempt(0, 2)], {"epoch": 2}, "waiting", "killed"),  # progress
        ([attempt(0, 2), attempt(2, 2), attempt(2, 2)], {"epoch": 2}, "waiting", "killed"),
        ([attempt(0, 2), *[attempt(2, 2)] * 3], {"epoch": 2}, "failed", "killed (tried 3 times from epoch 2)"),
        ([attempt(code=75, reason=STOPPED)] * 9, {}, "waiting", STOPPED),
        ([attempt(code=None, reason=LOST)] * 3, {}, "failed", LOST),
        ([attempt(code=2, reason="optimizer.momentum=0: bad")], {}, "failed", "optimizer.momentum=0: bad"),
        ([attempt(code=2, reason=f"no GPU; {DOCTOR_HINT}")] * 9, {}, "waiting", "no GPU"),  # another machine may do
        ([attempt(code=2, reason="run_dir=x: another job is training here")], {}, "waiting", "run_dir=x"),
        ([attempt(code=2, reason="data.path=x: cannot be read")] * 2, {}, "waiting", "data.path=x"),
        ([attempt(code=2, reason="data.path=x: cannot be read")] * 3, {}, "failed", "data.path=x"),
        ([attempt(2, 2, 2, "strategy: other replicas")], {"epoch": 2}, "waiting", "strategy"),  # it could be trained
        ([attempt(code=1)], {"events": [event("failed", error="Diverged", reason="NaN")]}, "failed", "NaN"),
        ([attempt(code=1)], {"events": [event("failed", error="OSError", reason="disk")]}, "waiting", "killed"),
        (
            [attempt(code=1)],
            {"events": [event("failed", error="Diverged"), event("started")]},
            "waiting",
            "killed",
        ),
    ],
)
def test_what_becomes_of_a_trial(attempts, facts, state, reason):
    facts = {"value": None, "events": (), "epoch": 0, **facts}
    trial = Trial(3, {}, (), state="running", attempts=tuple(attempts))
    judged = judge(trial, max_attempts=3, **facts)
    assert judged.state == state
    assert judged.reason.startswith(reason)
    assert judged.value == (facts["value"] if state == "finished" else None)


def test_a_pruned_trial_stays_so_even_if_it_was_faster():
    trial = Trial(3, {}, (), state="pruned", pruned_after_epoch=2)
    assert judge(trial, value=0.9, events=(), epoch=3, max_attempts=3) == trial


def test_the_end_of_an_attempt_is_noted_once():
    open_end = Trial(0, {}, (), attempts=(Attempt(1.0, "node7", 0),))
    ended = end_attempt(open_end, ended=5.0, reached_epoch=2, exit_code=1, reason="it crashed")
    assert ended.attempts == (Attempt(1.0, "node7", 0, 5.0, 2, 1, "it crashed"),)
    assert end_attempt(ended, ended=9.0, reached_epoch=9) == ended


@pytest.mark.parametrize(("was_asked", "reason"), [(False, LOST), (True, STOPPED)])
def test_an_attempt_whose_worker_was_killed_counts_unless_it_was_asked_to_stop(was_asked, reason):
    trial = Trial(0, {}, (), attempts=(Attempt(1.0, "node7", 0),))
    ended = end_attempt(expect_stop(trial) if was_asked else trial, ended=5.0, reached_epoch=2)
    assert [one.reason for one in ended.attempts] == [reason]


# The folder


@pytest.fixture
def sweep_folder(tmp_path):
    """A folder with a plan and one trial."""
    folder = SweepFolder(tmp_path / "sweep")
    with folder.locked(may_be_new=True):
        folder.write_plan(PLAN)
        folder.make_trials()
        folder.write_record(Trial(0, {"seed": 1}, ("seed=1",)))
    return folder


def test_what_is_written_is_read_back(sweep_folder):
    attempts = attempt(), Attempt(1.0, "node7", 0)
    trial = Trial(0, {"seed": 1, "a": [1, None], "b": "x"}, ("seed=1",), "failed", None, "why", attempts, 3)
    sweep_folder.write_record(trial)
    assert sweep_folder.read_record(0) == trial
    assert sweep_folder.read_plan() == PLAN


@pytest.mark.parametrize("recorded", ["waiting", "running", "finished", "failed"])
@pytest.mark.parametrize(
    ("left", "state"),
    [("nothing", "waiting"), ("history", "waiting"), ("too few epochs", "waiting"), ("damaged", "waiting"),
     ("all", "finished"), ("enough epochs", "finished"), ("lock", "running")],
)  # fmt: skip
def test_the_run_folder_has_the_last_word(recorded, left, state, sweep_folder):
    trial = Trial(0, {"seed": 1}, ("seed=1",), recorded, 0.25 if recorded == "finished" else None)
    sweep_folder.write_record(trial)
    run_dir = sweep_folder.run_dir(0)
    claim = None
    if left == "history":
        leave_history(run_dir, [0.1, 0.2, 0.3])
    elif left == "lock":
        claim = sweep_folder.claim(0)
    elif left != "nothing":
        accuracies = {"too few epochs": [0.1, 0.2], "enough epochs": [0.1, 0.75]}.get(left, [0.1, 0.2, 0.75])
        leave_results(run_dir, accuracies, ended_early="for good" if left == "enough epochs" else "")
    if left == "damaged":
        (run_dir / "summary.json").write_text((run_dir / "summary.json").read_text()[:-9])
    (found,) = read_sweep(sweep_folder.path).trials
    if recorded == "failed" and state == "waiting":
        state = "failed"  # a decision; that it stays one is for `judge`
    if recorded in ("finished", "failed") and left == "lock":
        state = {"finished": "waiting", "failed": "failed"}[recorded]  # its lock says nothing about its results
    assert found.state == state
    assert found.value == (0.75 if state == "finished" else None)
    if claim is not None:
        os.close(claim)


def test_what_is_final_is_read_once_unless_it_changes(sweep_folder, monkeypatch):
    """A large sweep has thousands of records, which each worker looks at again and again, holding the lock."""
    read = []
    monkeypatch.setattr(sweep_module, "read_regular", lambda path: read.append(path.name) or path.read_bytes())
    for number, state in enumerate(["finished", "running"]):
        leave_results(sweep_folder.run_dir(number), [0.1, 0.2, 0.75])
        value = 0.75 if state == "finished" else None
        sweep_folder.write_record(Trial(number, {"seed": number}, (f"seed={number}",), state, value))
    for _ in range(3):
        trials = sweep_folder.read_records()
        assert sweep_folder.result(PLAN, trials[0]) == 0.75
    assert read == ["0000.json", *["0001.json"] * 3]
    sweep_folder.write_record(Trial(0, {"seed": 0}, ("seed=0",), "failed"))
    (sweep_folder.run_dir(0) / "summary.json").unlink()
    assert sweep_folder.result(PLAN, sweep_folder.read_records()[0]) is None
    assert sweep_folder.read_record(0).state == "failed"


def test_a_claim_is_held_once(sweep_folder):
    claim = sweep_folder.claim(0)
    assert claim is not None
    assert sweep_folder.claim(0) is None
    os.close(claim)
    again = sweep_folder.claim(0)
    assert again is not None
    os.close(again)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("trials/0000.json", lambda _: b"", "trials/0000.json is damaged"),
        ("trials/0000.json", lambda c: c[:-9], "trials/0000.json is damaged"),
        ("trials/0000.json", lambda c: c.replace(b'"waiting"', b'"sleeping"'), "state is 'sleeping'"),
        ("trials/0000.json", lambda c: c.replace(b'"number": 0', b'"number": 1'), "is not that of trial 0"),
        ("trials/0000.json", lambda c: c.replace(b"seed=1", b"seed"), "is not that of trial 0"),
        ("trials/0000.json", lambda _: b"[" * 100_000, "trials/0000.json is damaged"),
        ("sweep.json", lambda c: c.replace(b"tpe", b"\xff"), "sweep.json is damaged"),
        ("sweep.json", lambda c: c.replace(b'"num_trials": 4', b'"num_trials": "4"'), "num_trials is '4'"),
    ],
)
def test_a_damaged_folder_is_refused(name, change, problem, sweep_folder):
    path = sweep_folder.path / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=r"^sweep_dir=") as raised:
        read_sweep(sweep_folder.path)
    assert problem in str(raised.value)


@pytest.mark.parametrize("left", ["0000.lock", "0000.log", "0000/"])
def test_no_number_is_given_twice_even_if_its_record_is_lost(left, sweep_folder):
    (sweep_folder.path / "trials" / "0000.json").unlink()
    path = sweep_folder.path / "trials" / left
    path.mkdir() if left.endswith("/") else path.touch()
    with pytest.raises(UserError, match=r"trials/0000\.json is missing"):
        sweep_folder.read_records()


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="is not empty and is not a sweep"):
        SweepFolder(tmp_path).check_usable()
    with pytest.raises(UserError, match="no sweep here"):
        read_sweep(tmp_path)


def test_a_file_system_without_locks_is_refused(monkeypatch, tmp_path):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = SweepFolder(tmp_path / "sweep").locked(may_be_new=True)
    with pytest.raises(UserError, match="or its file system has no locks"), lock:
        pass


def fill_the_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_start_that_was_cut_short_is_made_up_for(monkeypatch, small_npz, tmp_path):
    """Before the plan, and between the plan and the folder of the trials."""
    words = ["data=npz", f"data.path={small_npz}", "space=mlp", f"sweep_dir={tmp_path / 'sweep'}"]
    for method in ("write_plan", "make_trials"):
        with monkeypatch.context() as patched:
            patched.setattr(SweepFolder, method, fill_the_disk)
            with pytest.raises(OSError, match="No space left"):
                open_sweep_for(*words)
    open_sweep_for(*words)
    assert read_sweep(tmp_path / "sweep").trials == ()


def open_sweep_for(*overrides):
    with Signals() as signals:
        config = to_config(SWEEP, compose(SWEEP, overrides))
        return open_sweep(find_folder(config), search(*overrides), signals)


def test_a_full_disk_is_named_with_the_new_folder_of_the_sweep(monkeypatch, small_npz, tmp_path):
    words = ["data=npz", f"data.path={small_npz}", "space=mlp"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sweep", *words])
    monkeypatch.setattr(SweepFolder, "write_plan", fill_the_disk)
    with pytest.raises(EnvironmentFailed) as raised:
        sweep(to_config(SWEEP, compose(SWEEP, words)), Topology(), Console())
    (folder,) = (tmp_path / "runs").iterdir()
    assert str(raised.value) == (
        f"runs/{folder.name}: No space left on device; fix this and run the same command again with "
        f"sweep_dir=runs/{folder.name}"
    )


def test_what_killed_workers_leave_is_removed(sweep_folder):
    for folder, name in ((sweep_folder.path, "sweep.json"), (sweep_folder.path / "trials", "0000.json")):
        (folder / f".{name}.0123abcd.tmp").touch()
    being_written = sweep_folder.path / ".report.html.0123abcd.tmp"
    being_written.touch()
    sweep_folder.check_usable()
    with sweep_folder.locked():
        sweep_folder.tidy()
    assert list(sweep_folder.path.rglob("*.tmp")) == [being_written]


def test_a_report_that_cannot_be_written_is_a_warning(sweep_folder, caplog):
    (sweep_folder.path / "report.html").mkdir()
    write_report(sweep_folder)
    assert [record.message.partition(": ")[0] for record in caplog.records] == ["report.html was not written"]


@pytest.mark.parametrize(
    ("jobs", "gpus", "visible"), [(1, [None], None), (2, ["a,b", "c,d"], None), (3, ["a", "b", "c,d"], None),
    (2, ["d", "a"], "3,0"), (5, [None] * 5, None), (2, [None] * 2, "")],
)  # fmt: skip
def test_trainings_share_cores_and_gpus(jobs, gpus, visible, monkeypatch):
    monkeypatch.setattr(training, "query_gpus", lambda _: ["a", "b", "c", "d"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10, 14)))
    shares = training.shares(jobs, visible_gpus=visible)
    assert [(share.variables or {}).get("CUDA_VISIBLE_DEVICES") for share in shares] == gpus
    cores = [tuple(share.cores) for share in shares]
    expected = {1: [()], 2: [(10, 11), (12, 13)], 3: [(10,), (11,), (12, 13)], 5: [()] * 5}
    assert cores == expected[jobs]


def test_the_best_trial_is_the_earliest_of_equals(sweep_folder):
    for number, accuracy in enumerate([0.5, 0.9, 0.9]):
        sweep_folder.write_record(Trial(number, {"seed": number}, (f"seed={number}",)))
        leave_results(sweep_folder.run_dir(number), [0.1, 0.1, accuracy])
    sweep = read_sweep(sweep_folder.path)
    assert sweep.best.number == 1
    assert Inspection(sweep.run_dir(sweep.best)).read_summary().val.accuracy == 0.9


def test_the_page_says_how_to_train_the_best_with_the_users_own_files(sweep_folder):
    sweep_folder.write_plan(dataclasses.replace(PLAN, config_dir="my conf"))
    leave_results(sweep_folder.run_dir(0), [0.1, 0.2, 0.9])
    page = build_sweep_page(read_sweep(sweep_folder.path), output=sweep_folder.path / "report.html")
    words = shlex.split(re.search(r"python -m mnist_dist\.train ([^<]*)", html.unescape(page))[1])
    assert words == ["--config-dir=my conf", "seed=1", "run_dir=ANOTHER_FOLDER"]


# --multirun


def test_a_grid_is_in_hydras_order():
    assert expand(["seed=1,2", "model=mlp", "optimizer=choice(adam,sgd)"]) == [
        ("seed=1", "model=mlp", "optimizer=adam"),
        ("seed=1", "model=mlp", "optimizer=sgd"),
        ("seed=2", "model=mlp", "optimizer=adam"),
        ("seed=2", "model=mlp", "optimizer=sgd"),
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model.dropout=interval(0,1)", "let python -m mnist_dist.sweep search"),
        ("run_dir=a,b", "the runs are numbered below it"),
        ("seed=range(0,100000)", "more than 1000 values"),
        ("seed=range(1,1)", "has no values"),
        ("+seed=1,2", "not the name of a key"),
        ("seed", "expected KEY=VALUE"),
    ],
)
def test_a_grid_that_is_refused(text, problem):
    with pytest.raises(UserError) as raised:
        expand([text])
    assert problem in str(raised.value)


def test_a_grid_of_too_many_runs_is_refused():
    with pytest.raises(UserError, match="1000000 runs"):
        expand(["seed=range(1000)", "data.split_seed=range(1000)"])
