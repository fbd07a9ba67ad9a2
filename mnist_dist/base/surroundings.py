"""What a process finds around it, put in order before all else, so that a run depends only on its configuration.

Libraries read the user's variables and files, which were meant for other programs; standard streams may be closed, and
the working directory may be gone.
"""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from mnist_dist.base.errors import UserError

# Keras and TensorFlow look for Keras' settings below KERAS_HOME; below a file there are none.
_KERAS = {"KERAS_BACKEND": "tensorflow", "KERAS_HOME": os.devnull}
_OTHERS = {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}

# Switches of which TensorFlow accepts 0 and 1 only; any other value ends the process.
_SWITCHES = ("TF_DETERMINISTIC_OPS", "TF_CUDNN_DETERMINISTIC", "TF_CUDNN_USE_AUTOTUNE", "TF_CUDNN_USE_FRONTEND")
ARITHMETIC_VARIABLES = (
    *_SWITCHES,
    "TF_ENABLE_ONEDNN_OPTS",
    "TF_DISABLE_MKL",
    "TF_SET_ONEDNN_FPMATH_MODE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "NVIDIA_TF32_OVERRIDE",
)
"""What changes the results of libraries, at least in the last bits."""


def settle() -> None:
    """Put all of it in order, for a process that runs a command of this package.

    Raises:
        UserError: something can neither be put in order nor left alone; the message names it.
    """
    _open_streams()
    # A library's warning must not end a run, and the user cannot do anything about it.
    if any(action == "error" for action, *_ in warnings.filters):
        warnings.simplefilter("ignore")
    os.environ.update(_OTHERS)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns about settings that are not used
    _check_variables(os.environ)
    _check_matplotlibrc(Path("matplotlibrc"))


@contextlib.contextmanager
def settings_of_keras() -> Iterator[None]:
    """While Keras is imported: our settings, and none of `keras.json`."""
    before = {name: os.environ.get(name) for name in _KERAS}
    os.environ.update(_KERAS)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def arithmetic_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that are set and change what libraries compute, at least in the last bits."""
    return {name: environ[name] for name in ARITHMETIC_VARIABLES if name in environ}


@contextlib.contextmanager
def existing_working_directory() -> Iterator[None]:
    """A block with a working directory that exists: Hydra asks for its name, but it may have been removed."""
    try:
        Path.cwd()
    except FileNotFoundError:
        removed = os.open(".", os.O_PATH | os.O_DIRECTORY)
        os.chdir("/")
        try:
            yield
        finally:
            os.fchdir(removed)  # so that relative paths still lead nowhere
            os.close(removed)
    else:
        yield


def _open_streams() -> None:
    """Make sure that descriptors 0, 1 and 2 are open; otherwise the next opened file would take one of them."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 (for as long as the process runs)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # paths may have letters that the terminal lacks


def _check_variables(environ: Mapping[str, str]) -> None:
    if flags := environ.get("TF_XLA_FLAGS", "").strip():
        raise UserError(
            f"TF_XLA_FLAGS={flags}: with it TensorFlow compiles parts of the training in its own way, which gives "
            "other bits, or fails; unset it"
        )
    for name in _SWITCHES:
        if environ.get(name, "0").lower() not in ("0", "1", "true", "false"):
            raise UserError(f"{name}={environ[name]}: TensorFlow takes 0 or 1; unset it")


def _check_matplotlibrc(path: Path) -> None:
    """Raise UserError if Matplotlib cannot read this file, which it reads first; its content has no effect on us."""
    if not path.exists() or path.is_dir():
        return
    try:
        if not path.is_file():
            raise ValueError("it is not a regular file")
        path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: Matplotlib reads it and cannot ({error}); move it out of this folder") from error
