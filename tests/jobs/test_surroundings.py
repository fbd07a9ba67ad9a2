"""What surrounds a run on a user's machine: variables, library settings, streams, the working directory."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from support.job import TRAIN

from mnist_dist.base.surroundings import arithmetic_variables

# None of these may change anything or show up in a run's output.
HARMLESS = {
    "KERAS_BACKEND": "torch",
    "PYTHONWARNINGS": "error",
    "MPLBACKEND": "nonsense",
    "PYTHONIOENCODING": "ascii",
    "HYDRA_MAIN_MODULE": "nonsense",
    "HYDRA_FULL_ERROR": "0",
    "TF_USE_LEGACY_KERAS": "1",
    "XLA_FLAGS": "--nonsense=1",
    "TF_NUM_INTRAOP_THREADS": "many",
    "TF_NUM_INTEROP_THREADS": "many",
    "TF_CPP_MIN_LOG_LEVEL": "0",
    "OMP_NUM_THREADS": "3",
    "TMPDIR": "/proc/nowhere",
    "MPLCONFIGDIR": "/proc",
    "HOME": "/proc/nowhere",
    "COLUMNS": "many",
    "TERM": "nonsense",
    "CUDA_VISIBLE_DEVICES": "x,y",
    "SCIPY_ARRAY_API": "1",
}
KERAS_JSON = {"floatx": "float64", "epsilon": 1, "backend": "jax", "image_data_format": "channels_first"}
KERAS_SETTINGS = {
    "damaged Keras settings": "[]",
    "impossible Keras settings": '{"floatx": "float99"}',
    "other Keras settings": json.dumps(KERAS_JSON),
}


@pytest.fixture(scope="module")
def args(small_npz):
    return ("data=npz", f"data.path={small_npz}", "batch.global_size=64", "trainer.epochs=2", "strategy=single")


@pytest.fixture(scope="module")
def undisturbed(run_python, args, tmp_path_factory):
    """The folder of a run in a clean environment."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    result = run_python(*TRAIN, *args, f"run_dir={folder}")
    assert result.returncode == 0, result.stderr
    return folder


def outcome(folder) -> dict:
    summary = json.loads((folder / "summary.json").read_text())
    return {key: summary[key] for key in ("weights_sha256", "train", "val", "test")}


def pictures(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "plots").iterdir()}


@pytest.mark.parametrize("settings", KERAS_SETTINGS.values(), ids=KERAS_SETTINGS.keys())
def test_variables_and_settings_of_libraries_change_nothing(settings, run_python, args, undisturbed, tmp_path):
    """Those of Keras, Matplotlib, Python and threads, and text that the terminal cannot show."""
    keras_home, folder = tmp_path / "keras", tmp_path / "ré"
    keras_home.mkdir()
    (keras_home / "keras.json").write_text(settings)
    (tmp_path / "matplotlibrc").write_text("no.such.key: 3\ntext.usetex: True\nbackend: qtagg\nfont.size: 30\n")
    env = {**HARMLESS, "KERAS_HOME": str(keras_home)}
    result = run_python(*TRAIN, *args, f"run_dir='{folder}'", env=env, cwd=tmp_path, fresh=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1].startswith("Results: ")
    assert "r\\xe9" in result.stdout
    assert outcome(folder) == outcome(undisturbed)
    assert pictures(folder) == pictures(undisturbed)
    assert (keras_home / "keras.json").read_text() == settings
    assert (folder / "train.log").read_text("utf-8").count("ré") == 2
    if settings == KERAS_SETTINGS["other Keras settings"]:
        evaluated = run_python("-m", "mnist_dist.evaluate", f"run_dir='{folder}'", env=env, cwd=tmp_path, fresh=True)
        assert (evaluated.returncode, evaluated.stderr) == (0, "")


@pytest.mark.parametrize(
    ("variable", "value", "fragment"),
    [
        ("TF_XLA_FLAGS", "--tf_xla_auto_jit=2", "other bits"),
        ("TF_XLA_FLAGS", "--nonsense", "unset it"),
        ("TF_DETERMINISTIC_OPS", "yes", "TensorFlow takes 0 or 1"),
        ("TF_CUDNN_DETERMINISTIC", "", "TensorFlow takes 0 or 1"),
    ],
)
def test_a_variable_that_cannot_be_left_alone_is_named(variable, value, fragment, run_python, args, tmp_path):
    result = run_python(*TRAIN, *args, f"run_dir={tmp_path / 'run'}", env={variable: value}, fresh=True)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {variable}={value}: ")
    assert fragment in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["binary", "fifo"])
def test_a_matplotlibrc_that_cannot_be_read_is_named(kind, run_python, args, tmp_path):
    path = tmp_path / "matplotlibrc"
    path.write_bytes(b"\xff\xfe") if kind == "binary" else os.mkfifo(path)
    result = run_python(*TRAIN, *args, f"run_dir={tmp_path / 'run'}", cwd=tmp_path, timeout=60, fresh=True)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: matplotlibrc: ")


def test_ranks_whose_libraries_compute_differently(run_job, args, tmp_path):
    """All would have the same sums, but not those of a single process, and no later check would notice."""
    code = (
        "import os; from mnist_dist import train; "
        "'\"index\": 1' in os.environ['TF_CONFIG'] and os.environ.update(ONEDNN_DEFAULT_FPMATH_MODE='BF16'); "
        "train.main()"
    )
    several = [arg for arg in args if not arg.startswith("strategy=")]
    for result in run_job(("multiworker", 2), *several, f"run_dir={tmp_path / 'run'}", script=("-c", code), fresh=True):
        assert result.returncode == 2
        assert "rank 1 has ONEDNN_DEFAULT_FPMATH_MODE=BF16, rank 0 has ONEDNN_DEFAULT_FPMATH_MODE=None" in result.stderr


def test_arithmetic_variables():
    environ = {"TF_ENABLE_ONEDNN_OPTS": "0", "HOME": "/proc/nowhere", "NVIDIA_TF32_OVERRIDE": "1"}
    assert arithmetic_variables(environ) == {"TF_ENABLE_ONEDNN_OPTS": "0", "NVIDIA_TF32_OVERRIDE": "1"}


def shell(command: str, python_environment, cwd) -> subprocess.CompletedProcess[str]:
    words = ["bash", "-c", command]
    return subprocess.run(
        words, env=python_environment, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("closed", ["<&- 2>&-", ">&-", ">&- 2>&- <&-"])
def test_closed_streams_are_like_the_null_device(closed, args, undisturbed, python_environment, tmp_path):
    command = shlex.join([sys.executable, *TRAIN, *args, f"run_dir={tmp_path / 'run'}"])
    result = shell(f"{command} {closed}", python_environment, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert outcome(tmp_path / "run") == outcome(undisturbed)
    assert ("Results: " in result.stdout) == (not closed.startswith(">"))
    assert (tmp_path / "run" / "train.log").read_text().splitlines()[-1].startswith("Results: ")
    refused = shell(f"{command} model.dropout=3 {closed}", python_environment, tmp_path)
    assert refused.returncode == 2


def test_a_working_directory_that_is_gone(args, undisturbed, python_environment, tmp_path):
    command = shlex.join([sys.executable, *TRAIN, *args])
    gone = f"mkdir {tmp_path}/gone && cd {tmp_path}/gone && rmdir {tmp_path}/gone && "
    result = shell(f"{gone} {command} run_dir={tmp_path}/run", python_environment, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert outcome(tmp_path / "run") == outcome(undisturbed)
    for relative in ("", f"data.path=x.npz run_dir={tmp_path}/other"):
        refused = shell(f"{gone} {command} {relative}", python_environment, tmp_path)
        assert refused.returncode == 2
        (line,) = refused.stderr.splitlines()
        assert "No such file or directory" in line


def test_data_through_a_redirected_stream(args, undisturbed, small_npz, python_environment, tmp_path):
    command = shlex.join([sys.executable, *TRAIN, *args, "data.path=/dev/stdin", f"run_dir={tmp_path / 'run'}"])
    result = shell(f"{command} < {small_npz}", python_environment, tmp_path)
    assert result.returncode == 0, result.stderr
    assert outcome(tmp_path / "run") == outcome(undisturbed)


# Other users


@pytest.fixture(scope="module")
def as_a_user():
    """A command prefix that drops root's right to read and write everything."""
    if os.geteuid() != 0:
        return ""
    return "setpriv --bounding-set=-dac_override,-dac_read_search,-fowner "


@pytest.mark.parametrize("umask", ["077", "000", "0777"])
def test_any_umask(umask, args, undisturbed, as_a_user, python_environment, tmp_path):
    """With 0777 nobody can read a run's files, so the run fails with one line."""
    command = shlex.join([sys.executable, *TRAIN, *args, f"run_dir={tmp_path / 'run'}"])
    epochs = "trainer.epochs=1" if umask != "000" else ""
    first = shell(f"umask {umask}; {as_a_user}{command} {epochs}", python_environment, tmp_path)
    if umask == "0777":
        assert first.returncode in (1, 2)
        assert len(first.stderr.splitlines()) == 1, first.stderr
        assert first.stderr.startswith("error: ")
        assert "Permission denied" in first.stderr
        return
    assert (first.returncode, first.stderr) == (0, "")
    if epochs:
        second = shell(f"umask {umask}; {as_a_user}{command}", python_environment, tmp_path)
        assert (second.returncode, second.stderr) == (0, "")
    assert outcome(tmp_path / "run") == outcome(undisturbed)
    modes = {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert modes == {"0o600" if umask == "077" else "0o666"}


def test_a_home_folder_and_caches_that_cannot_be_written(args, undisturbed, as_a_user, python_environment, tmp_path):
    (tmp_path / "home").mkdir(mode=0o555)
    command = shlex.join([sys.executable, *TRAIN, *args, f"run_dir={tmp_path / 'run'}"])
    variables = f"HOME={tmp_path}/home KERAS_HOME={tmp_path}/keras XDG_CACHE_HOME="
    result = shell(f"{variables} {as_a_user}{command}", python_environment, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert not (tmp_path / "keras").exists()  # Keras would write its settings there
    assert outcome(tmp_path / "run") == outcome(undisturbed)
    assert not any((tmp_path / "home").iterdir())


def test_a_user_whom_the_machine_does_not_know(args, undisturbed, python_environment, tmp_path):
    """As in a container that runs as a numeric user ID."""
    command = shlex.join([sys.executable, *TRAIN, *args, f"run_dir={tmp_path / 'run'}"])
    unknown = "unshare --user --map-user=54321 --map-group=54321 env -u HOME -u XDG_CACHE_HOME"
    result = shell(f"{unknown} {command}", python_environment, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert outcome(tmp_path / "run") == outcome(undisturbed)


@pytest.mark.parametrize("command", ["train", "train trainer.epochs=5", "evaluate"])
@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_the_run_of_another_user(command, mode, args, undisturbed, as_a_user, python_environment, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    folder.chmod(mode)
    name, *more = command.split()
    words = [sys.executable, "-m", f"mnist_dist.{name}", *(args if name == "train" else ()), *more, f"run_dir={folder}"]
    result = shell(as_a_user + shlex.join(words), python_environment, tmp_path)
    folder.chmod(0o755)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: run_dir={folder}: cannot be ")
    assert line.removesuffix("; python -m mnist_dist.doctor tells more").endswith("Permission denied")


@pytest.mark.parametrize("key", ["data.path", "plots.reference"])
def test_files_of_another_user(key, args, small_npz, as_a_user, python_environment, tmp_path):
    shutil.copy(small_npz, tmp_path / "theirs")
    (tmp_path / "theirs").chmod(0)
    words = [sys.executable, *TRAIN, *args, f"{key}=theirs", f"run_dir={tmp_path / 'run'}"]
    result = shell(as_a_user + shlex.join(words), python_environment, tmp_path)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {key}=theirs")
    assert "Permission denied" in line
