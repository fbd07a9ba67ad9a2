"""Bad input, as new users give it: exit code 2, one clear line, nothing written, TensorFlow not started."""

import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support import CHECKOUT
from support.job import DOCTOR_HINT
from support.processes import LIGHT_LIBRARIES, fork_server

from mnist_dist import __version__
from mnist_dist.base.memory import describe_bytes, usable_memory
from mnist_dist.config.data import DataConfig
from mnist_dist.data.load import load_dataset

TRAIN, EVALUATE, BENCHMARK = "mnist_dist.train", "mnist_dist.evaluate", "mnist_dist.benchmark.__main__"
NO_DATA = ("data=npz", "data.path=nowhere.npz")  # ends the runs that get as far as the data

# Runs a module as `python -m` does, and reports whether TensorFlow was imported.
WATCHED = """
import os, runpy, sys
del sys.argv[0]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    with open(os.environ["IMPORTED"], "w") as stream:
        print(*{"tensorflow", "keras"} & set(sys.modules), file=stream)
"""


@dataclass(frozen=True)
class Answer:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str
    knows_tensorflow: bool


@pytest.fixture
def work(tmp_path):
    """The empty folder that commands run in."""
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.fixture
def ask(python_environment, tmp_path, work):
    """Run `python -m MODULE *args` in `work` and return its answer."""
    caches = (f"data.keras_home={tmp_path}/keras", f"data.cache_dir={tmp_path}/cache")
    # A proxy that nobody listens at, in case something does try to reach the network.
    nobody = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    env = {**python_environment, **nobody, "no_proxy": "", "IMPORTED": str(tmp_path / "imported")}

    def ask(module, *args):
        printed = Path(tempfile.mkdtemp(dir=tmp_path))
        paths = printed / "stdout", printed / "stderr"
        words = ["-c", WATCHED, module, *(caches if module == TRAIN else ()), *args]
        code = fork_server(LIGHT_LIBRARIES).start(words, env=env, cwd=work, printed=paths).wait(60)
        imported = (tmp_path / "imported").read_text().strip()
        return Answer(code, *(path.read_text() for path in paths), knows_tensorflow=bool(imported))

    return ask


@pytest.fixture
def refuse(ask, work):
    """Run a command that must be refused before anything starts; returns the line without its `error: `."""

    def refuse(module, *args):
        before = snapshot(work)
        answer = ask(module, *args)
        assert answer.code == 2, answer
        assert answer.stdout == ""
        assert answer.stderr.startswith("error: ")
        assert answer.stderr.endswith("\n")
        assert len(answer.stderr.splitlines()) == 1
        assert not answer.knows_tensorflow
        assert snapshot(work) == before
        return answer.stderr.removeprefix("error: ").rstrip("\n")

    return refuse


def snapshot(folder):
    """All paths below a folder, with their contents."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# The command line: arguments, and the line they get

CONF = CHECKOUT / "conf"
EXPERIMENTS = ", ".join(sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
QUOTES = (
    "cannot be read as KEY=VALUE; a value with blanks, brackets or other special characters needs quotes of its own"
)

KEYS = [
    ("trainer.epoch=3", "no such key; did you mean trainer.epochs=3? (all keys: --help)"),
    ("epochs=3", "no such key; did you mean trainer.epochs=3? (all keys: --help)"),
    ("batch.size=64", "no such key; the keys here are global_size, scaling, num_shards (all keys: --help)"),
    ("modle=cnn", "no such key; did you mean model=cnn? (all keys: --help)"),
    ("model.hiden_sizes=[1]", "no such key; did you mean model.hidden_sizes=[1]? (all keys: --help)"),
    ("model.units=3", "no such key; the keys here are pretrained, dropout, activation, kernel_initializer, "
     "output_initializer, hidden_sizes (all keys: --help)"),
    ("model.factory=net:build", "no such key; give model=keras as well (all keys: --help)"),
    ("optimizer.momentum=0.9", "no such key; give optimizer=sgd as well (all keys: --help)"),
    ("optimizer.rate=0.9", "no such key; the keys here are learning_rate, beta_1, beta_2, epsilon (all keys: --help)"),
    ("augment.max_pixels=1", "no such key; give augment=shift or augment=affine as well (all keys: --help)"),
    ("data.splitseed=1", "no such key; did you mean data.split_seed=1? (all keys: --help)"),
    ("+foo=1", "no key can be added; to change one write foo=1"),
    ("++model.foo=1", "no key can be added; to change one write model.foo=1"),
    ("+trainer.epochs=1", "no key can be added; to change one write trainer.epochs=1"),
    ("+experiment=debug", "no key can be added; to change one write experiment=debug"),
    ("~trainer.epochs", "no key can be left out; to change one write KEY=VALUE"),
    ("~model", "no key can be left out; to change one write KEY=VALUE"),
    ("trainer.epochs.foo=3", "must be a whole number"),
]  # fmt: skip

CHOICES = [
    ("model=mpl", "no such choice; choose one of cnn, keras, mlp"),
    ("model=", "no such choice; choose one of cnn, keras, mlp"),
    ("model=null", "no such choice; choose one of cnn, keras, mlp"),
    ("model=3", "no such choice; choose one of cnn, keras, mlp"),
    ("model=[mlp]", "no such choice; choose one of cnn, keras, mlp"),
    ("data=mnits", "no such choice; choose one of auto, digits, mnist, npz"),
    ("augment=shfit", "no such choice; choose one of affine, none, shift"),
    ("optimizer=adm", "no such choice; choose one of adam, adamw, sgd"),
    ("experiment=x", f"no such choice; choose one of {EXPERIMENTS}"),
    ("experiment=null", f"no such choice; choose one of {EXPERIMENTS}"),
    ("strategy=mirorred", "no such choice; choose one of auto, horovod, mirrored, multiworker, single"),
    ("precision=float61", "no such choice; choose one of auto, float32, mixed_bfloat16, mixed_float16"),
    ("data.name=mnits", "is set by data=auto, mnist, digits or npz"),
    ("model.name=cnn", "is set by model=...; leave it alone"),
    ("batch.scaling=strnog", "must be strong or weak"),
    ("learning_rate.scaling=x", "must be none, linear or sqrt"),
    ("reproducibility=exactly", "must be auto, exact or fast"),
    ("reproducibility=", "must be auto, exact or fast"),
    ("threads.intra_op=many", "must be auto or a number from 1 to 1024"),
    ("threads.inter_op=1.5", "must be auto or a number from 1 to 1024"),
]

RATE = ("scaling", "warmup_epochs", "schedule", "schedule_epochs", "final_fraction", "start_fraction", "rise_fraction",
        "step_factor", "step_epochs")  # fmt: skip
TYPES = [
    ("trainer.epochs=abc", "must be a whole number"),
    ("trainer.epochs=", "must be a whole number"),
    ("trainer.epochs=null", "must be a whole number"),
    ("trainer.epochs=1e2", "must be a whole number"),
    ("trainer.epochs=[3]", "must be a whole number"),
    ("batch.global_size=1.5", "must be a whole number"),
    ("batch.global_size=true", "must be a whole number"),
    ("seed=one", "must be a whole number"),
    ("optimizer.learning_rate=fast", "must be a number"),
    ("optimizer.learning_rate=0,001", "give one value; a list needs brackets: 'optimizer.learning_rate=[0,001]', "
     "and a text with a comma quotes of its own: \"optimizer.learning_rate='0,001'\""),
    ("model.dropout=null", "must be a number"),
    ("console.tensorflow_messages=maybe", "must be true or false"),
    ("strategy.num_replicas=two", "must be a whole number or null"),
    ("batch.num_shards=auto", "must be a whole number"),
    ("batch.num_shards=2.5", "must be a whole number"),
    ("reproducibility=null", "must be a text"),
    ("threads.inter_op=null", "must be a text"),
    ("threads.cores=2", "no such key; the keys here are intra_op, inter_op (all keys: --help)"),
    ("threads=2", "must be given key by key: threads.intra_op=..., threads.inter_op=..."),
    ("model.hidden_sizes=256", "must be a list in square brackets, each entry a whole number"),
    ("model.hidden_sizes=null", "must be a list in square brackets, each entry a whole number"),
    ("model.hidden_sizes=[256,x]", "must be a list in square brackets, each entry a whole number"),
    ("model.hidden_sizes=[1.5]", "must be a list in square brackets, each entry a whole number"),
    ("trainer=3", "must be given key by key: trainer.epochs=..., trainer.stop_at_val_accuracy=..., "
     "trainer.patience=..."),
    ("trainer.patience=some", "must be a whole number or null"),
    ("learning_rate=0.1", f"must be given key by key: {', '.join(f'learning_rate.{key}=...' for key in RATE)}"),
    ("run_dir=${foo}", "Interpolation key 'foo' not found"),
]  # fmt: skip

INT32, INT64 = 2**31 - 1, 2**63 - 1
POSITIVE = "must be a positive number of float32 (from 1.2e-38 to 3.4e+38)"
DECAY = "must be at least 0 and less than 1 in float32 (at most 0.9999999)"
A_DAY = "must be more than 0 and at most 86400"
MANY_DIGITS = "1" * 4000  # Python reads up to 4,300

# Keys with their range, and values outside it.
OUTSIDE = {
    ("trainer.epochs", f"must be from 1 to {INT32}"): ["0", "-0", "-3", "2147483648", MANY_DIGITS],
    ("trainer.stop_at_val_accuracy", "must be more than 0 and at most 1"): ["0.0", "-0.5", "1.01", "98.0", "nan"],
    ("trainer.patience", f"must be from 1 to {INT32}"): ["0", "-1", "2147483648"],
    ("seed", f"must be from 0 to {INT32}"): ["-1", "2147483648", "99_999_999_999"],
    ("data.split_seed", f"must be from 0 to {2**32 - 1}"): ["-1", "4294967296"],
    ("data.val_fraction", "must be between 0 and 1"): ["0.0", "-0.0", "1.0", "1e+300", "nan", "inf", "1e400"],
    ("batch.global_size", f"must be from 1 to {INT32}"): ["0", "-512", "9223372036854775808"],
    ("batch.num_shards", "must be from 1 to 1024"): ["0", "-8", "1025"],
    ("strategy.num_replicas", "must be from 1 to 1024"): ["0", "-1", "1025"],
    ("strategy.start_timeout_s", A_DAY): ["0.0", "-0.0", "nan", "inf", "86401.0"],
    ("model.dropout", "must be from 0 to 0.9999"): ["1.0", "-0.1", "nan", "0.999999999", "-1e-46", "1e+300"],
    ("model.hidden_sizes", f"each must be from 1 to {INT64}"): ["[256, 0]", "[-1]", "[9223372036854775808]", "[[1]]"],
    ("optimizer.learning_rate", POSITIVE): ["0.0", "-0.0", "-1.0", "nan", "inf", "1e-46", "1e-38", "3.5e+38", "1e+300"],
    ("optimizer.epsilon", POSITIVE): ["0.0", "-1e-07", "nan", "inf", "1e-46", "1e+300"],
    ("optimizer.beta_1", DECAY): ["1.0", "0.99999999", "-1e-46", "nan", "inf"],
    ("optimizer.beta_2", DECAY): ["1.0", "0.99999999", "-1.0", "nan"],
    ("learning_rate.warmup_epochs", f"must be from 0 to {INT32}"): ["-1.0", "nan", "inf", "1e+300"],
    ("learning_rate.schedule", "must be constant, cosine, one_cycle or step"): ["linear"],
    ("learning_rate.schedule_epochs", f"must be from 1 to {INT32}"): ["0", "2147483648"],
    ("learning_rate.final_fraction", "must be from 0 to 1"): ["-0.1", "1.1", "nan"],
    ("learning_rate.start_fraction", "must be from 0 to 1"): ["-0.1", "1.1", "nan"],
    ("learning_rate.rise_fraction", "must be more than 0 and less than 1"): ["0.0", "1.0", "nan"],
    ("learning_rate.step_factor", "must be more than 0 and at most 1"): ["0.0", "1.1", "nan"],
    ("learning_rate.step_epochs", f"must be from 1 to {INT32}"): ["0", "-1"],
    ("loss.label_smoothing", DECAY): ["1.0", "-0.1", "nan"],
    ("gradient_clip_norm", POSITIVE): ["0.0", "-1.0", "nan", "inf", "1e-46"],
    ("precision.initial_loss_scale", f"must be from 1 to {2.0**126}"): ["0.0", "0.5", "nan", "inf", "1e+300"],
    ("precision.loss_scale_growth_steps", f"must be from 1 to {INT32}"): ["0", "9223372036854775808"],
    ("threads.intra_op", "must be auto or a number from 1 to 1024"): ["0", "-1", "1025", "99999999999", "1e3", "0x10",
                                                                      "007", MANY_DIGITS],
    ("threads.inter_op", "must be auto or a number from 1 to 1024"): ["0", "-1", "1025", "nan"],
    ("checkpoint.every_epochs", f"must be from 1 to {INT32}"): ["0", "99999999999"],
    ("checkpoint.every_s", "must be from 0 to inf"): ["-1.0", "nan"],
    ("checkpoint.keep", f"must be from 1 to {INT32}"): ["0", "99999999999"],
}  # fmt: skip
ADAMW_OUTSIDE = [
    ("weight_decay", "-0.1", "must be at least 0 and at most 3.4e+38"),
    ("weight_decay", "nan", "must be at least 0 and at most 3.4e+38"),
    ("weight_decay", "1e+300", "must be at least 0 and at most 3.4e+38"),
]
RANGES = [
    *((TRAIN, key, value, rule) for (key, rule), values in OUTSIDE.items() for value in values),
    *((BENCHMARK, key, "99999999999", f"must be from 1 to {INT32}") for key in ("epochs", "startup.repeats")),
    (BENCHMARK, "warmup_epochs", "-1", f"must be from 0 to {INT32}"),
    *((BENCHMARK, "timeout_s", value, A_DAY) for value in ("nan", "0.0", "1e+300")),
]

GRAMMAR = [
    ("=3", "=3: expected KEY=VALUE (all keys: --help)"),
    ("trainer", "trainer: expected KEY=VALUE (all keys: --help)"),
    ("", "'': expected KEY=VALUE (all keys: --help)"),
    ("optimizer.learning_rate=[1", f"optimizer.learning_rate=[1: {QUOTES}: \"optimizer.learning_rate='[1'\""),
    ("run_dir=a=b", f"run_dir=a=b: {QUOTES}: \"run_dir='a=b'\""),
    ("data.path=my (1).npz", f"data.path=my (1).npz: {QUOTES}: \"data.path='my (1).npz'\""),
    ("--foo", "--foo: no such option; keys are given as KEY=VALUE, without dashes (all keys: --help)"),
    ("--epochs=3", "--epochs=3: no such option; keys are given as KEY=VALUE, without dashes (all keys: --help)"),
    ("seed=" + "1" * 5000, "seed=" + "1" * 95 + "..." + "1" * 50 + ": has too many digits or brackets"),
    ("x" * 5000, "x" * 100 + "..." + "x" * 50 + ": expected KEY=VALUE (all keys: --help)"),
    ("model=../data/npz", "model=../data/npz: no such choice; choose one of cnn, keras, mlp"),
    ("seed=${seed}", "seed=${seed}: Recursive interpolation detected"),
    ("seed=${foo:1}", "seed=${foo:1}: Unsupported interpolation type foo"),
]  # fmt: skip

NOT_OURS = "cannot be changed on the command line (all keys: --help)"
NO_OPTION = "no such option; keys are given as KEY=VALUE, without dashes (all keys: --help)"
# Options and settings of Hydra's that this package does not support.
HYDRAS_OWN = [
    *((text, f"{text}: {NOT_OURS}") for text in (
        "hydra.mode=MULTIRUN", "+hydra.mode=MULTIRUN", "++hydra.mode=MULTIRUN", "~hydra.mode", "hydra.job.chdir=true",
        "hydra.run.dir=x", "hydra.output_subdir=x", "hydra/launcher=joblib", "hydra/job_logging=default", "hydra=quiet",
        "hydra.callbacks.a._target_=os.mkdir", "hydra.searchpath=[pkg://x]", "hydra.job.env_set.X=1",
        "hydra@foo=quiet", "schema/train=evaluate", "schema/model=cnn", "model@data=mlp")),
    *((text, f"{text.split()[0]}: {NO_OPTION}") for text in (
        "--experimental-rerun=evil.pkl", "--experimental-rerun evil.pkl", "--exp=evil.pkl", "--config-path=.", "--run",
        "--package=model", "-p", "--info", "--info=all", "-i", "--hydra-help", "--shell-completion install=bash",
        "-sc install=bash", "-sc uninstall=zsh", "-sc query=fish", "-sc")),
    ("--cfg", "argument -c/--cfg: expected one argument; all keys and options: --help"),
    ("--cfg=hydra", "argument -c/--cfg: invalid choice: 'hydra' (choose from {choices}); all keys and options: --help"),
    ("--resolve", "--resolve: goes with --cfg job or --help"),
    ("--config-name", "argument -cn/--config-name: expected one argument; all keys and options: --help"),
    *((f"--config-name={name}", f"--config-name={name}: say where this file is: --config-dir=FOLDER")
      for name in ("foo", "schema/train", "data/mnist", "hydra/config", "")),
    ("--config-dir=nowhere", "--config-dir=nowhere: no such folder"),
    ("--config-dir=", "--config-dir=: no such folder"),
]  # fmt: skip


@pytest.mark.parametrize(("argument", "problem"), [*KEYS, *CHOICES, *TYPES])
def test_bad_key_or_choice_or_type(argument, problem, refuse):
    line = refuse(TRAIN, argument, *(() if argument.startswith("data=") else NO_DATA))
    assert line == f"{argument}: {problem}"


@pytest.mark.parametrize(("module", "key", "value", "rule"), RANGES)
def test_value_out_of_range(module, key, value, rule, refuse):
    shown = f"{key}={value.replace('_', '')}: " if len(value) < 200 else f"{key}={value[:100]}...{value[-50:]}: "
    shown = {"-0": f"{key}=0: ", "1e400": f"{key}=inf: ", "1e3": f"{key}=1000.0: "}.get(value, shown)
    line = refuse(module, f"{key}={value}", *NO_DATA)
    assert line == shown + rule


@pytest.mark.parametrize(("key", "value", "rule"), ADAMW_OUTSIDE)
def test_value_of_adamw_out_of_range(key, value, rule, refuse):
    assert refuse(TRAIN, "optimizer=adamw", f"optimizer.{key}={value}", *NO_DATA) == f"optimizer.{key}={value}: {rule}"


def test_a_misspelt_kind_of_weights(refuse):
    line = refuse(TRAIN, "optimizer=adamw", "optimizer.decay_excludes=[bias,kernels]", *NO_DATA)
    kinds = "kernel, bias, normalization, embedding"
    assert line == f"optimizer.decay_excludes=kernels: no such kind of weights; the kinds are {kinds}"


@pytest.mark.parametrize("key", ["model.hidden_sizes", "model.filters"])
def test_too_many_layers(key, refuse):
    choice = () if key == "model.hidden_sizes" else ("model=cnn",)
    line = refuse(TRAIN, *choice, f"{key}=[{'8,' * 400}8]", *NO_DATA)
    assert line.startswith(f"{key}=[8, 8, 8, ")
    assert line.endswith(": 401 layers; at most 400 are possible")


@pytest.mark.parametrize(
    "value",
    ["seed=0", "seed=-0", "seed=1_000", "seed=2147483647", "optimizer.learning_rate=3.4e38", "model.dropout=-0.0",
     "optimizer.learning_rate=1.2e-38", "optimizer.beta_1=0.9999999", "optimizer.epsilon=1.2e-38",
     "batch.num_shards=1024", "checkpoint.every_s=inf", "learning_rate.warmup_epochs=1e-46",
     "strategy.num_replicas=1024", "model.hidden_sizes=[]", "learning_rate.schedule_epochs=null",
     "gradient_clip_norm=null", "gradient_clip_norm=3.4e38", "loss.label_smoothing=0.9999999"],
)  # fmt: skip
def test_value_at_the_edge_of_its_range(value, refuse):
    assert refuse(TRAIN, value, *NO_DATA).startswith("data.path=nowhere.npz: ")


@pytest.mark.parametrize("module", [TRAIN, EVALUATE, BENCHMARK])
@pytest.mark.parametrize(("text", "line"), HYDRAS_OWN)
def test_hydras_own_options(module, text, line, refuse, work):
    (work / "evil.pkl").write_bytes(b"cos\nmkdir\n(S'ran'\ntR.")  # a pickle that creates a folder
    refused = refuse(module, *text.split(" ", 1))
    # Python's wording for a choice differs from version to version.
    assert refused == line.format(choices=refused.partition("choose from ")[2].partition(")")[0])


@pytest.mark.parametrize(("argument", "line"), GRAMMAR)
def test_not_a_key_and_value(argument, line, refuse):
    assert refuse(TRAIN, *NO_DATA, argument) == line


def test_an_unknown_key_unlike_any_other_lists_all(refuse):
    line = refuse(TRAIN, "foo=1")
    assert line.startswith("foo=1: no such key; the keys here are run_dir, seed, data, augment, model, optimizer, ")
    assert line.endswith(" (all keys: --help)")


def test_options_and_keys_in_any_order(ask):
    orders = [("--cfg", "job", "seed=3", "trainer.epochs=4"), ("seed=3", "--cfg", "job", "trainer.epochs=4")]
    answers = [ask(TRAIN, *order) for order in orders]
    assert [answer.code for answer in answers] == [0, 0]
    assert answers[0].stdout == answers[1].stdout
    assert "\nseed: 3\n" in answers[0].stdout


def test_the_last_of_several_values_wins(refuse):
    assert refuse(TRAIN, "trainer.epochs=3", "trainer.epochs=x") == "trainer.epochs=x: must be a whole number"


def test_an_unset_variable_in_a_value(refuse):
    line = refuse(TRAIN, "run_dir=${oc.env:NO_SUCH_VARIABLE}", *NO_DATA)
    assert line.startswith("run_dir=${oc.env:NO_SUCH_VARIABLE}: ")
    assert "Environment variable 'NO_SUCH_VARIABLE' not found" in line


MINE = "defaults: [train, _self_]\n"
# The user's own files: what they contain, and how the line begins.
FILES = {
    "empty": ("", "--config-name=mine: does not configure train; start the file with defaults: [train, _self_]"),
    "keys alone": ("seed: 3\n", "--config-name=mine: does not configure train; start the file with defaults: "),
    "another command's": ("defaults: [evaluate, _self_]\n", "--config-name=mine: does not configure train; "),
    "a list": ("- seed\n", "primary config 'mine' must be a DictConfig, got ListConfig"),
    "a number": ("3\n", "the configuration cannot be read: "),
    "no YAML": ("a: [1, 2\n", "the configuration cannot be read: "),
    "no text": ("a: \0\n", "the configuration cannot be read: "),
    "a Python object": ("seed: !!python/object/apply:os.mkdir [ran]\n", "the configuration cannot be read: "),
    "defaults that are no list": ("defaults: train\n", "the configuration cannot be read: "),
    "defaults that are missing": ("defaults: [train, nowhere]\n", "In 'mine': Could not load 'nowhere'."),
    "defaults in a circle": ("defaults: [mine]\n", "the configuration cannot be read: the defaults of its files form "),
    "an unknown key": (MINE + "sead: 3\n", "In 'mine': ConfigKeyError raised while composing config: Key 'sead' not "),
    "values in a circle": (MINE + "seed: ${seed}\n", "seed: Recursive interpolation detected"),
    "a variable that is not set": (MINE + "seed: ${oc.env:NO_SUCH}\n", "seed: KeyError raised while resolving"),
    "what cannot be decoded": (MINE + "seed: ${oc.decode:'[1'}\n", "seed: GrammarParseError raised while resolving"),
    "too many digits": (MINE + f"seed: {'1' * 5000}\n", "the configuration cannot be read: "),
    "not a number": (MINE + "optimizer: {learning_rate: .nan}\n", f"optimizer.learning_rate=nan: {POSITIVE}"),
    "a variable to copy": (MINE + "hydra: {job: {env_copy: [NO_SUCH]}}\n", "the configuration cannot be read: "),
    "another launcher": ("defaults: [train, {override hydra/launcher: x}]\n", "hydra/launcher=x: no such choice; "),
}  # fmt: skip
LOG = "{version: 1, handlers: {f: {'()': os.mkdir, path: ran}}, root: {handlers: [f]}}"
# What Hydra would do for such a file; it has no effect.
SETTINGS = {
    "several runs": "{mode: MULTIRUN, sweep: {dir: ran}, sweeper: {params: {seed: '1,2'}}}",
    "another folder": "{job: {chdir: true}, run: {dir: ran}, output_subdir: ran}",
    "callbacks": "{callbacks: {a: {_target_: os.mkdir, path: ran}}}",
    "a log": "{job_logging: {version: 1, handlers: {f: {class: logging.FileHandler, filename: ran}}, "
             "root: {handlers: [f]}}}",
    "log handlers": f"{{job_logging: {LOG}, hydra_logging: {LOG}, verbose: true}}",
    "variables": "{job: {env_set: {HOME: ran}}}",
    "packages to search": "{searchpath: [pkg://evil, file:///nowhere]}",
}  # fmt: skip


def write_mine(tmp_path, text):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.yaml").write_text(text)
    return f"--config-dir={folder}", "--config-name=mine"


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_users_own(name, refuse, tmp_path):
    text, beginning = FILES[name]
    line = refuse(TRAIN, *write_mine(tmp_path, text))
    assert line.startswith(beginning)


@pytest.mark.parametrize("name", SETTINGS)
def test_hydras_settings_in_a_file_have_no_effect(name, refuse, work, tmp_path):
    (work / "evil").mkdir()
    (work / "evil" / "__init__.py").write_text("open('ran', 'w')\n")
    line = refuse(TRAIN, *write_mine(tmp_path, f"{MINE}hydra: {SETTINGS[name]}\nseed: 3\n"), *NO_DATA)
    assert line == "data.path=nowhere.npz: cannot be read: No such file or directory"


@pytest.mark.parametrize("kind", ["fifo", "folder", "endless", "link to nothing", "none", "path"])
def test_a_bad_file_of_the_users_own(kind, refuse, tmp_path):
    path, name = tmp_path / "mine.yaml", "mine" if kind != "path" else "../mine"
    make = {
        "fifo": os.mkfifo,
        "folder": Path.mkdir,
        "endless": lambda path: path.symlink_to("/dev/zero"),
        "link to nothing": lambda path: path.symlink_to("nothing"),
    }
    make.get(kind, lambda path: None)(path)
    line = refuse(TRAIN, f"--config-dir={tmp_path}", f"--config-name={name}", *NO_DATA)
    assert line == f"--config-name={name}: no file {name}.yaml in the folder {tmp_path}"


def test_a_file_of_the_users_own_with_a_name_of_ours(refuse, tmp_path):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "mlp.yaml").write_text("defaults: [cnn]\n")
    line = refuse(TRAIN, f"--config-dir={tmp_path}/mine", *NO_DATA)
    assert line == f"--config-dir={tmp_path}/mine: model/mlp.yaml has the name of a file of this package; rename it"


def test_a_network_that_builds_on_none_of_ours(refuse, tmp_path):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "wide.yaml").write_text("{name: wide, pretrained: null}\n")
    line = refuse(TRAIN, f"--config-dir={tmp_path}/mine", "model=wide", *NO_DATA)
    assert line.startswith("model.name=wide: no such network; start your own file with defaults: ")


def test_hydras_variables_change_nothing(run_python, work):
    env = {"HYDRA_FULL_ERROR": "0", "HYDRA_MAIN_MODULE": "evil.module", "HYDRA_DEPRECATION_WARNINGS_AS_ERRORS": "1"}
    result = run_python("-m", TRAIN, "--cfg", "job", "seed=3", cwd=work, env=env, fresh=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "\nseed: 3\n" in result.stdout
    assert snapshot(work) == {}


def test_version(ask):
    assert ask(TRAIN, "--version").stdout == f"mnist_dist {__version__}\n"


@pytest.mark.parametrize(
    "contender",
    ["strategy=single hydra.mode=MULTIRUN", "strategy=single hydra.searchpath=[pkg://evil]", "strategy=single seed=-1",
     "strategy=multiworker processes=1025", "strategy=multiworker processes=99999999999",
     "strategy=mirrored strategy.num_replicas=1025", "keras steps_per_execution=1025",
     "keras steps_per_execution=" + "1" * 4400],
)  # fmt: skip
def test_contenders_out_of_range(contender, refuse):
    assert refuse(BENCHMARK, f'contenders=["{contender}"]', *NO_DATA).startswith("contenders: ")


def test_an_unknown_key_in_a_file_of_the_users_own(refuse, tmp_path):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "wide.yaml").write_text("defaults: [mlp]\nwidth: 3\n")
    line = refuse(TRAIN, f"--config-dir={tmp_path}/mine", "model=wide", *NO_DATA)
    assert "model/wide" in line
    assert "'width' not in 'MLPConfig'" in line


@pytest.mark.parametrize("choice", ["shift", "affine"])
def test_images_moved_out_of_view(choice, refuse, small_npz):
    line = refuse(TRAIN, "data=npz", f"data.path={small_npz}", f"augment={choice}", "augment.max_pixels=8")
    assert line.startswith("augment.max_pixels=8")
    assert line.endswith(": must be less than the sides of the images, which have 8x8 pixels")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["data=npz"], "data.path=None: data=npz needs data.path=FILE.npz"),
        (["data=digits", "data.path=x"], "data.path=x: data=digits reads no file; give data=mnist or data=npz as well"),
        (["data.path=x"], "data.path=x: data=auto reads no file; give data=mnist or data=npz as well"),
        (
            ["optimizer=sgd", "optimizer.nesterov=true"],
            "optimizer.nesterov=True: needs optimizer.momentum greater than 0",
        ),
        (["model=cnn", "model.filters=[0]"], "model.filters=[0]: each must be from 1 to "),
        (["model=cnn", "model.hidden_sizes=[1]"], "model.hidden_sizes=[1]: no such key; "),
        (["augment.max_pixels=1"], "augment.max_pixels=1: no such key; "),
        (["augment=shift", "augment.max_degrees=1"], "augment.max_degrees=1: no such key; "),
    ],
)
def test_keys_that_do_not_go_together(arguments, line, refuse):
    assert refuse(TRAIN, *arguments).startswith(line)


def test_grids_are_refused(refuse):
    """All of it, before the first run starts."""
    assert refuse(TRAIN, "trainer.epochs=1,2", *NO_DATA).startswith("trainer.epochs=1,2: give one value")
    line = refuse(EVALUATE, "--multirun", "split=val,test", "run_dir=nowhere")
    assert line == "--multirun: goes with mnist_dist.train only; give the command once for each value"
    for values, problem in [
        ("trainer.epochs=1,0", "trainer.epochs=0: must be from 1"),
        ("optimizer=adam,foo", "optimizer=foo: no such choice"),
        ("model.dropout=interval(0,1)", "model.dropout=interval(0,1): has no end of values"),
        ("run_dir=a,b", "run_dir=a,b: give one folder"),
        ("hydra.mode=a,b", "hydra.mode=a: cannot be changed"),
    ]:
        assert refuse(TRAIN, "--multirun", values, *NO_DATA).startswith(problem)


# The data file


def to_npz(arrays, save=np.savez):
    stream = io.BytesIO()
    save(stream, **arrays)
    return stream.getvalue()


def floats(images, **at_first_pixel):
    """Images in 0..1 with one pixel replaced."""
    images = images / 255
    images[0, 0, 0] = at_first_pixel.get("first", 0)
    return images


# What is done to the small arrays, and how the line continues after the file's name.
DATA = {
    "empty file": (lambda _: b"", "not a usable data file: it is not an .npz archive, or its end is missing; write"),
    "cut short": (lambda a: to_npz(a)[:-100], "not a usable data file: it is not an .npz archive, or its end is "),
    "beginning lost": (lambda a: to_npz(a)[100:], "not a usable data file: "),
    "one byte changed": (lambda a: flip(to_npz(a)), "not a usable data file: Bad CRC-32 for file 'x_train.npy'"),
    "compressed, changed": (lambda a: flip(to_npz(a, np.savez_compressed)), "not a usable data file: "),
    "text": (lambda _: b"5,0,0,0\n" * 100, "not a usable data file: it is not an .npz archive"),
    "one .npy array": (lambda a: to_npy(a["x_train"]), "not a usable data file: it is not an .npz archive"),
    "pickle": (lambda a: b"\x80\x04K\x01.", "not a usable data file: it is not an .npz archive"),
    "pickled arrays": (lambda a: to_npz({**a, "y_train": a["y_train"].astype(object)}),
                       "not a usable data file: it holds pickled objects, which are never loaded; save plain arrays"),
    "other keys": (lambda a: to_npz({"x_train": a["x_train"], "labels": a["y_train"]}),
                   "not a usable data file: it has no y_train, x_test, y_test"),
    "flat images": (lambda a: to_npz({**a, "x_train": a["x_train"].reshape(600, 64)}),
                    "x_train has shape (600, 64); expected (n, height, width) or (n, height, width, channels)"),
    "no test images": (lambda a: to_npz({**a, "x_test": a["x_test"][:0]}), "x_test has shape (0, 8, 8); expected"),
    "other test shape": (lambda a: to_npz({**a, "x_test": a["x_test"][:, :7]}),
                         "x_train has images of shape (8, 8), x_test of shape (7, 8); they must agree"),
    "signed pixels": (lambda a: to_npz({**a, "x_train": a["x_train"].astype(int)}),
                      "x_train is int64; expected uint8 (0..255) or float (0..1)"),
    "text as pixels": (lambda a: to_npz({**a, "x_train": a["x_train"].astype(str)}),
                       "x_train is <U3; expected uint8 (0..255) or float (0..1)"),
    "mixed types": (lambda a: to_npz({**a, "x_train": floats(a["x_train"])}),
                    "x_train is float64, x_test is uint8; they must agree"),
    "NaN": (lambda a: to_npz({**a, "x_train": floats(a["x_train"], first=np.nan)}),
            "x_train has NaN or infinite values; remove them"),
    "infinity": (lambda a: to_npz({**a, "x_test": floats(a["x_test"], first=np.inf)}),
                 "x_test has NaN or infinite values; remove them"),
    "floats to 255": (lambda a: to_npz({**a, "x_train": 255 * floats(a["x_train"], first=1)}),
                      "x_train is float64 from 0 to 255; floats must be in 0..1 (divide by 255, or store uint8)"),
    "negative floats": (lambda a: to_npz({**a, "x_train": floats(a["x_train"], first=-1)}),
                        "x_train is float64 from -1 to "),
    "too few labels": (lambda a: to_npz({**a, "y_train": a["y_train"][1:]}),
                       "x_train has 600 images but y_train has 599 labels"),
    "one-hot labels": (lambda a: to_npz({**a, "y_train": np.eye(4)[a["y_train"]]}),
                       "y_train has shape (600, 4); expected (n,), one label per image"),
    "float labels": (lambda a: to_npz({**a, "y_test": a["y_test"] / 1}),
                     "y_test is float64; expected whole numbers (class 0, 1, 2, ...)"),
    "negative labels": (lambda a: to_npz({**a, "y_test": a["y_test"].astype(int) - 1}),
                        "y_test has labels out of range: -1"),
    "unknown test labels": (lambda a: to_npz({**a, "y_test": a["y_test"] + 3}),
                            "y_test has labels missing from y_train: 4, 5, 6"),
    "one class": (lambda a: to_npz({**a, "y_train": a["y_train"] * 0, "y_test": a["y_test"] * 0}),
                  "y_train has only the label 0; at least two classes are needed"),
}  # fmt: skip


def flip(content):
    return content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]


def to_npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize("name", DATA)
def test_data_file(name, small_arrays, refuse, work):
    damage, problem = DATA[name]
    (work / "mine.npz").write_bytes(damage(small_arrays))
    assert refuse(TRAIN, "data=npz", "data.path=mine.npz", "run_dir=run").startswith(f"data.path=mine.npz: {problem}")


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("nowhere.npz", "cannot be read: No such file or directory"),
        (".", "cannot be read: Is a directory"),
        ("'~nobody-here/a.npz'", "no such user's home folder; write the path out"),
        ("a" * 300, "cannot be read: File name too long"),
    ],
)
def test_data_file_that_is_not_there(path, problem, refuse):
    line = refuse(TRAIN, "data=npz", f"data.path={path}")
    assert line == f"data.path={path.strip(chr(39))}: {problem}"


def test_mnist_file_that_is_not_there(refuse):
    for path in ("nowhere", "a" * 300):
        assert refuse(TRAIN, "data=mnist", f"data.path={path}").startswith(f"data.path={path}: cannot be read: ")


def test_mnist_file_of_something_else(refuse, small_npz):
    line = refuse(TRAIN, "data=mnist", f"data.path={small_npz}")
    assert line.startswith(f"data.path={small_npz}: x_train is not MNIST's (SHA-256 ")
    assert line.endswith("get the original file, or give data=npz for your own data")


def test_mnist_folder_without_the_files(refuse, work):
    line = refuse(TRAIN, "data=mnist", "data.path=.")
    assert line == "data.path=.: no file train-images-idx?-ubyte or .gz in this folder"


# Files that never end or never begin: only regular files are read


@pytest.fixture
def fifo(work):
    os.mkfifo(work / "fifo")
    yield "fifo"
    (work / "fifo").unlink()  # not a file that a snapshot can read


@pytest.mark.parametrize("path", ["fifo", "/dev/zero", "/dev/null", "/dev/urandom", "/dev/stdin", "/dev/full"])
@pytest.mark.parametrize(
    ("key", "more"),
    [
        ("data.path", ["data=npz"]),
        ("data.path", ["data=mnist"]),
        ("plots.reference", NO_DATA),
    ],
)
def test_not_a_regular_file(key, more, path, fifo, refuse):
    """(The server's standard input is a pipe.)"""
    line = refuse(TRAIN, *[argument for argument in more if not argument.startswith(key)], f"{key}={path}")
    assert line.startswith(f"{key}={path}")
    assert "cannot be read" in line
    assert "Not a regular file" in line


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte.gz"])
def test_not_a_regular_file_in_the_mnist_folder(name, refuse, work, small_arrays):
    folder = work.parent / "idx"
    folder.mkdir()
    for stem in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        key = ("x_" if "images" in stem else "y_") + ("train" if "train" in stem else "test")
        images = small_arrays[key].astype(np.uint8)
        head = bytes([0, 0, 8, images.ndim]) + b"".join(size.to_bytes(4, "big") for size in images.shape)
        if not name.startswith(stem):
            (folder / f"{stem}-ubyte").write_bytes(head + images.tobytes())
    os.mkfifo(folder / name)
    line = refuse(TRAIN, "data=mnist", f"data.path={folder}")
    assert line == f"data.path={folder / name}: cannot be read: Not a regular file"


def test_a_lock_that_is_not_a_regular_file(ask, tmp_path, work):
    """In somebody else's cache: it only causes a warning."""
    (tmp_path / "cache").mkdir()
    os.mkfifo(tmp_path / "cache" / "digits-v1.lock")
    answer = ask(TRAIN, "data=digits", "plots.reference=original", "data.val_fraction=0.99999999")
    assert answer.code == 2
    assert "cannot cache the digits at" in answer.stdout


def test_mnist_that_is_not_available(ask, work, tmp_path):
    answer = ask(TRAIN, "data=mnist")
    path = tmp_path / "keras" / "datasets" / "mnist.npz"
    assert answer.code == 2
    assert answer.stderr.startswith("error: data=mnist: MNIST is not here and cannot be downloaded (")
    assert answer.stderr.endswith(
        f"); give data.path=mnist.npz (or a folder with the four IDX files), or put mnist.npz at {path}, "
        "or give data=digits\n"
    )
    assert answer.stdout == f"downloading MNIST to {path}\n"
    assert not answer.knows_tensorflow
    assert snapshot(work) == {}


@pytest.mark.parametrize("val_fraction", ["0.9999", "0.999"])
def test_split_without_training_images(val_fraction, refuse, small_npz):
    line = refuse(TRAIN, "data=npz", f"data.path={small_npz}", f"data.val_fraction={val_fraction}")
    assert line.startswith(f"data.val_fraction={val_fraction}: 600 training images cannot be split like this: ")


# What cannot fit in memory


def claim(shape):
    """An .npz whose x_train claims to have this shape."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return head.getvalue()


@pytest.mark.parametrize(
    ("arguments", "beginning"),
    [
        (["model.hidden_sizes=[99999999999]"],
         "model.hidden_sizes=[99999999999]: the network has 6,899,999,999,935 parameters, for which this process would "
         "need at least "),
        (["model.hidden_sizes=[100000,100000]"],
         "model.hidden_sizes=[100000, 100000]: the network has 10,007,000,004 parameters"),
        (["model.hidden_sizes=[9223372036854775807,9223372036854775807]"],
         "model.hidden_sizes=[9223372036854775807, 9223372036854775807]: the network has 85,070,"),
        (["model=cnn", "model.kernel_size=1000000"],
         "model.filters=[16, 32] model.kernel_size=1000000 model.dense_size=128: the network has 528,"),
        (["model=cnn", "model.filters=[1000000000]"],
         "model.filters=[1000000000] model.kernel_size=3 model.dense_size=128: the network has 2,058,"),
        (["model=cnn", "model.filters=[100000000]", "model.kernel_size=1", "model.dense_size=1"],
         "model.filters=[100000000] model.kernel_size=1 model.dense_size=1: the network has 1,800,000,009 parameters"),
    ],
)  # fmt: skip
def test_network_that_cannot_fit(arguments, beginning, refuse, small_npz):
    line = refuse(TRAIN, "data=npz", f"data.path={small_npz}", "run_dir=run", *arguments)
    assert line.startswith(beginning)
    assert line.endswith(f" it may use {describe_bytes(usable_memory())}")


def test_data_that_cannot_fit(refuse, work):
    """The one-hot labels and the confusion matrix of a million classes."""
    images, labels = np.zeros((10**6, 1, 1), np.uint8), np.arange(10**6)
    np.savez(work / "mine.npz", x_train=images, y_train=labels, x_test=images[:10], y_test=labels[:10])
    line = refuse(TRAIN, "data=npz", "data.path=mine.npz", "run_dir=run")
    assert line.startswith("data.path=mine.npz: 1,000,010 images in 1,000,000 classes, for which this process would ")
    assert "one-hot labels" in line
    assert "confusion matrices 32 TB" in line


LIMITED = "import resource, runpy; resource.setrlimit(resource.RLIMIT_DATA, (600 * 10**6,) * 2); "


def test_archive_that_unpacks_to_more_than_the_memory(run_python, work, small_arrays):
    """The archive's directory gives the size; the limit is set low so that the file can be small."""
    np.savez_compressed(work / "mine.npz", **{**small_arrays, "x_train": np.zeros((10**6, 28, 28), np.uint8)})
    command = f"{LIMITED}runpy.run_module('{TRAIN}', run_name='__main__')"
    result = run_python("-c", command, "data=npz", "data.path=mine.npz", "run_dir=run", cwd=work, fresh=True)
    assert result.returncode == 2
    assert result.stderr == (
        "error: data.path=mine.npz: not a usable data file: its arrays need 784 MB of memory, and this process may use "
        "600 MB\n"
    )


@pytest.mark.parametrize(
    ("shape", "problem"),
    [((10**12, 28, 28), "Unable to allocate "), ((10**6, 28, 28), "EOF: reading array data, expected ")],
)
def test_array_that_claims_more_than_it_has(shape, problem, refuse, work, small_arrays):
    with zipfile.ZipFile(work / "mine.npz", "w") as archive:
        for name, array in small_arrays.items():
            archive.writestr(f"{name}.npy", claim(shape) if name == "x_train" else to_npy(array))
    line = refuse(TRAIN, "data=npz", "data.path=mine.npz", "run_dir=run")
    assert line.startswith(f"data.path=mine.npz: not a usable data file: {problem}")


# The run folder


@pytest.mark.parametrize(
    ("run_dir", "problem"),
    [
        ("file", "Not a directory"),
        ("file/run", "Not a directory"),
        ("/proc/run", "No such file or directory"),
        ("a" * 300, "File name too long"),
        ("new/" + "a" * 300, "File name too long"),
        ("/dev/null", "Not a directory"),
        ("dangling", "dangling is a link to gone: No such file or directory"),
        ("dangling/new/run", "{work}/dangling is a link to gone: No such file or directory"),
        ("chain", "chain is a link to dangling: No such file or directory"),
        ("loop", "loop is a link to loop: Too many levels of symbolic links"),
        ("link to file", "Not a directory"),
    ],
)
def test_run_folder_that_cannot_be_written(run_dir, problem, refuse, work, small_npz):
    (work / "file").write_bytes(b"")
    for link, target in (("dangling", "gone"), ("chain", "dangling"), ("loop", "loop"), ("link to file", "file")):
        (work / link).symlink_to(target)
    line = refuse(TRAIN, f"run_dir={run_dir}", "data=npz", f"data.path={small_npz}")
    assert line == f"run_dir={run_dir}: cannot be written: {problem.format(work=work)}{DOCTOR_HINT}"


def test_run_folder_of_an_unknown_user(refuse):
    for module in (TRAIN, EVALUATE):
        line = refuse(module, "run_dir='~nobody-here/run'")
        assert line == "run_dir=~nobody-here/run: no such user's home folder; write the path out"


def test_run_folder_of_somebody_else(refuse, work, small_npz):
    (work / "thesis").mkdir()
    (work / "thesis" / "chapter.tex").write_text("A beginning")
    line = refuse(TRAIN, "run_dir=thesis", "data=npz", f"data.path={small_npz}")
    assert line == (
        "run_dir=thesis: this folder is not empty and is not a run folder (it has no config.yaml); name another one"
    )


@pytest.fixture
def fake_run(ask, work, small_npz):
    """A run folder `run`, as complete as it can be without training."""
    config = ask(TRAIN, "--cfg", "job", "--resolve", "data=npz", f"data.path={small_npz}").stdout
    dataset = load_dataset(
        DataConfig("npz", str(small_npz), cache_dir="", keras_home="", val_fraction=0.175, split_seed=0)
    )
    folder = work / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(config)
    with zipfile.ZipFile(folder / "model.keras", "w") as archive:
        for name in ("config.json", "metadata.json"):
            archive.writestr(name, "{}")
    split = {"loss": 0.5, "accuracy": 0.5, "num_correct": 1, "num_examples": 2}
    placement = dict.fromkeys(("world_size", "num_replicas", "global_batch_size", "per_replica_batch_size", "seed"), 1)
    summary = {
        "status": "finished",
        "dataset": {"name": "npz", "sha256": dataset.sha256, "num_train": 2, "num_val": 2, "num_test": 2},
        **placement,
        "strategy": "single",
        "precision": "float32",
        "epochs_completed": 150,
        **dict.fromkeys(("train", "val", "test"), split),
        "avoidable_bias_percent": 0.0,
        "variance_percent": 0.0,
        "weights_sha256": "",
        "timing": dict.fromkeys(("startup_s", "first_epoch_s", "median_epoch_s", "total_s"), 1),
        "resumed_from_epochs": [],
        "versions": {},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_run_folder_of_another_configuration(fake_run, refuse, small_npz):
    (fake_run / "summary.json").unlink()
    line = refuse(
        TRAIN,
        "run_dir=run",
        "data=npz",
        f"data.path={small_npz}",
        "seed=1",
        "model.hidden_sizes=[8]",
        "model.dropout=0",
    )
    assert line == (
        "run_dir=run: holds a run of another configuration (model.dropout was 0.4, is now 0.0; model.hidden_sizes was "
        "[256, 256], is now [8]; seed was 0, is now 1); name another run_dir, or use its configuration"
    )


def test_finished_run_of_another_configuration(fake_run, refuse, small_npz):
    line = refuse(TRAIN, "run_dir=run", "data=npz", f"data.path={small_npz}", "optimizer=sgd")
    assert "optimizer.name was adam, is now sgd" in line


@pytest.mark.parametrize("content", ["[1, 2", "- 1", "3", ""])
def test_run_folder_with_a_damaged_config(content, fake_run, refuse, small_npz):
    (fake_run / "config.yaml").write_text(content)
    line = refuse(TRAIN, "run_dir=run", "data=npz", f"data.path={small_npz}")
    assert line.startswith("run_dir=run: ")


def test_reference_that_is_not_there(refuse):
    line = refuse(TRAIN, "plots.reference=old.csv", *NO_DATA)
    assert line.startswith("plots.reference=old.csv cannot be read (No such file or directory); check the path")


# Evaluation


def test_evaluate_without_a_run(refuse):
    assert refuse(EVALUATE) == "run_dir=None: say which run to evaluate: run_dir=runs/..."


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["run_dir=nowhere"], "run_dir=nowhere: no model.keras here; name the folder of a finished run"),
        ([f"run_dir={'a' * 300}"], f"run_dir={'a' * 300}: cannot be read: File name too long"),
        (["run_dir=run", "split=tset"], "split=tset: must be train, val or test"),
        (["rundir=run"], "rundir=run: no such key; did you mean run_dir=run? (all keys: --help)"),
        (["run_dir=run", "data.path=nowhere.npz"], "data.path=nowhere.npz: cannot be read: No such file or directory"),
        (
            ["run_dir=run", "trainer.epochs=3"],
            "trainer.epochs=3: no such key; the keys here are run_dir, split, data, console",
        ),
    ],
)
def test_evaluate_bad_arguments(arguments, line, fake_run, refuse):
    assert refuse(EVALUATE, *arguments).startswith(line)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("model.keras", None, "no model.keras here; name the folder of a finished run"),
        ("summary.json", None, "no finished run here: summary.json"),
        ("summary.json", '{"dataset": {"sha256": ', "no finished run here: summary.json"),
        ("summary.json", "", "no finished run here: summary.json is damaged (it is empty)"),
        ("summary.json", "[]", "no finished run here: summary.json is damaged (it is [], not an object)"),
        ("summary.json", '{"status": 1}', "no finished run here: summary.json is damaged (status is 1)"),
        ("config.yaml", None, "config.yaml is missing"),
        ("config.yaml", "[1, 2", "config.yaml is damaged"),
        ("config.yaml", "- 1", "config.yaml is damaged (it is not a configuration)"),
        ("config.yaml", "seed: 0", "config.yaml does not say which data was used ('data')"),
        ("config.yaml", "data: {name: npz}", "config.yaml does not say which data was used ("),
        ("config.yaml", "data: {name: 5, foo: 5}", "config.yaml does not say which data was used (Key 'foo' not in "),
        ("config.yaml", "data: x", "config.yaml does not say which data was used ("),
    ],
)
def test_evaluate_an_incomplete_run(name, content, problem, fake_run, refuse):
    (fake_run / name).unlink()
    if content is not None:
        (fake_run / name).write_text(content)
    assert refuse(EVALUATE, "run_dir=run").startswith(f"run_dir=run: {problem}")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "it is empty"),
        (b"damaged", "it is not an archive written by Keras, or its end is missing"),
        (b"PK\x05\x06" + bytes(18), "it has no config.json, metadata.json"),
        (b"\x89HDF\r\n\x1a\n", "it is not an archive written by Keras, or its end is missing"),
    ],
    ids=["empty", "text", "empty zip", "HDF5"],
)
def test_evaluate_a_damaged_model(content, problem, fake_run, refuse):
    (fake_run / "model.keras").write_bytes(content)
    line = refuse(EVALUATE, "run_dir=run")
    assert line == (
        f"run/model.keras: not a usable model: model.keras is damaged ({problem}); remove it, and the training "
        "command of this run makes it again from its last checkpoint"
    )


def test_evaluate_where_a_folder_is_in_the_way(fake_run, refuse):
    (fake_run / "evaluation_test.json").mkdir()
    assert refuse(EVALUATE, "run_dir=run").startswith("run_dir=run: evaluation_test.json is not a regular file; ")


def test_evaluate_an_archive_that_holds_no_model(fake_run, ask, work):
    """Only Keras can tell, so here TensorFlow is started."""
    before = snapshot(work)
    answer = ask(EVALUATE, "run_dir=run")
    assert answer.code == 2, answer
    assert answer.stderr.startswith("error: run/model.keras: not a usable model: ")
    assert len(answer.stderr.splitlines()) == 1
    assert answer.knows_tensorflow  # so this file's other tests would have noticed it as well
    assert snapshot(work) == before


# Help


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_keys_and_choices(flag, ask, work):
    answer = ask(TRAIN, flag)
    assert (answer.code, answer.stderr, answer.knows_tensorflow) == (0, "", False)
    groups = {path.name for path in CONF.iterdir() if path.is_dir()} - {"hydra", "defaults", "sweep"}
    assert {"data", "model", "optimizer", "experiment"} <= groups
    for group in groups:
        for path in (CONF / group).glob("*.yaml"):
            assert f"\n  {group}={path.stem}" in answer.stdout
    for key in ("run_dir: null", "global_size: 512", "epochs: 150", "learning_rate: 0.001"):
        assert key in answer.stdout
    assert "schema" not in answer.stdout
    assert "hydra/" not in answer.stdout
    assert "defaults" not in answer.stdout.partition("Groups and their choices")[2]
    assert snapshot(work) == {}


@pytest.mark.parametrize("option", ["--help", "--cfg=job", "--version"])
def test_nobody_reads_the_output(option, python_environment, work):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", TRAIN, option]
    result = subprocess.run(command, env=python_environment, cwd=work, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, b"")


def test_help_shows_the_choices_made(ask):
    stdout = ask(TRAIN, "--help", "optimizer=sgd", "trainer.epochs=7").stdout
    assert "momentum: 0.0" in stdout
    assert "epochs: 7" in stdout


def test_help_of_evaluate(ask):
    answer = ask(EVALUATE, "--help")
    assert (answer.code, answer.knows_tensorflow) == (0, False)
    assert "python -m mnist_dist.evaluate run_dir=" in answer.stdout
    assert "split: test" in answer.stdout


def test_help_with_a_misspelt_key(refuse):
    assert "did you mean trainer.epochs=3?" in refuse(TRAIN, "--help", "trainer.epoch=3")


# The same directly: `python -m`, as users start it


@pytest.mark.parametrize(
    ("module", "argument", "code", "beginning"),
    [
        (TRAIN, "trainer.epoch=3", 2, "error: trainer.epoch=3: no such key; did you mean trainer.epochs=3?"),
        (TRAIN, "batch.global_size=0", 2, "error: batch.global_size=0: must be from 1 to 2147483647"),
        (EVALUATE, "run_dir=nowhere", 2, "error: run_dir=nowhere: no model.keras here"),
        (TRAIN, "--help", 0, ""),
    ],
)
def test_from_the_shell(module, argument, code, beginning, run_python, work):
    result = run_python(
        "-X", "importtime", "-m", module, argument, cwd=work, env={"KERAS_HOME": os.fspath(work)}, fresh=True
    )
    imports = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    printed = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert result.returncode == code
    assert len(printed) == (1 if beginning else 0)
    assert "".join(printed).startswith(beginning)
    assert any("hydra" in line for line in imports)
    assert not any(line.endswith((" tensorflow", " keras")) for line in imports)
    assert snapshot(work) == {}
