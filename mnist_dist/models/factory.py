"""Networks that a function of the user's own builds."""

import contextlib
import importlib
import math
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from mnist_dist.base.errors import UserError
from mnist_dist.config.model import KerasConfig
from mnist_dist.config.rules import shorten

_KERAS = "Exception encountered when calling"


def build_from_factory(config: KerasConfig, *, image_shape: tuple[int, ...], seed: int) -> keras.Model:
    """Have the user's function build its network, for images of (height, width) or (height, width, channels).

    Initial weights follow `seed`, as far as the function draws them by Keras, NumPy or `random`.

    Raises:
        UserError: there is no such function, it fails, or it returns something else than an uncompiled keras.Model.
    """
    create = _find(config)
    keras.utils.set_random_seed(seed)
    with _blaming(config, "fails"):
        model = create(**config.args)
    if not isinstance(model, keras.Model):
        raise UserError(f"model.factory={config.factory}: returns {type(model).__name__}, not a keras.Model")
    if model.compiled:
        raise UserError(
            f"model.factory={config.factory}: returns a compiled model; leave out compile(): optimizer, loss and "
            "metrics are configured here"
        )
    if any(variable._value is None for variable in model.variables):  # made while weights were counted
        raise UserError(
            f"model.factory={config.factory}: returns the same layers when it is called again; let it make them anew"
        )
    if not model.built:
        with _blaming(config, f"builds a network that fails for an image of shape {_full(image_shape)}"):
            model(np.zeros((1, *_full(image_shape)), np.float32))
    return model


def count_weights(config: KerasConfig, *, image_shape: tuple[int, ...]) -> int | None:
    """How many weights the function's network will have, found without memory for them; None if that is not possible.

    That is so for functions that compute with the weights, or read them from a file.
    """
    create = _find(config)
    try:
        # Within this scope Keras creates variables that have shapes only.
        with keras.StatelessScope(initialize_variables=False):
            model = create(**config.args)
            if not model.built:
                model(keras.KerasTensor((1, *_full(image_shape))))
        num_weights: int = sum(math.prod(variable.shape) for variable in model.weights)
        return num_weights
    except (Exception, SystemExit):
        return None
    finally:
        keras.backend.clear_session()  # of those variables, which Keras would create now


def load_factory(config: KerasConfig) -> None:
    """Import the function's module, so that Keras knows the layers that are there; raises UserError."""
    _find(config)


def _find(config: KerasConfig) -> Callable[..., Any]:
    module_name, _, name = config.factory.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    with _blaming(config, "cannot be imported"):
        module = importlib.import_module(module_name)
    for value in vars(module).values():  # so that Keras can load what it has saved
        if isinstance(value, type) and issubclass(value, keras.Layer) and not value.__module__.startswith("keras."):
            keras.saving.get_custom_objects().setdefault(value.__name__, value)
    create = getattr(module, name, None)
    if not callable(create):
        raise UserError(
            f"model.factory={config.factory}: {module.__file__} has no function {name}"
            if create is None
            else f"model.factory={config.factory}: {name} is {type(create).__name__}, not a function"
        )
    function: Callable[..., Any] = create
    return function


@contextlib.contextmanager
def _blaming(config: KerasConfig, what: str) -> Iterator[None]:
    """An error in the block becomes UserError, which says what the network's function does, and where it failed."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise UserError(f"model.factory={config.factory}: {what}: {last_line(error)}") from error


def last_line(error: BaseException) -> str:
    """The last line of a traceback, with the place in the user's code where it happened.

    Of the errors that led to this one, the last that the user's code raised: those that Keras raises fill pages.
    """
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    theirs = [one for one in chain if _is_theirs(_files(one)[-1:])]
    # Keras hides its own part of a traceback; so of errors in one place the first is the user's.
    theirs = [one for one in theirs if _files(one)[-1:] == _files(theirs[0])[-1:]][-1:]
    for one in (*theirs, chain[-1], error):
        places = [file for file in _files(one) if _is_theirs([file])]
        if places:
            path, line = places[-1]
            return f"{_say(one)} ({path.name}, line {line})"
    return _say(error)


def first_of(error: BaseException) -> BaseException:
    """The error that came first, of those that led to this one; Keras hides it (`from None`)."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _say(error: BaseException) -> str:
    text = " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).partition("Arguments received by")[0].split())
    text = re.sub(rf"^{_KERAS} \S+ ", "", text)
    return shorten(f"{type(error).__name__}: {text}" if text else type(error).__name__, 300)


def _files(error: BaseException) -> list[tuple[Path, int]]:
    """The files and lines of a traceback, the innermost last."""
    return [(Path(frame.filename), frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]


def _is_theirs(files: Sequence[tuple[Path, int]]) -> bool:
    """Whether files are neither of this package, nor of the standard library, nor of an installed package."""
    others = [Path(__file__).resolve().parents[1], Path(sysconfig.get_path("stdlib"))]
    return bool(files) and all(
        path.is_file() and "site-packages" not in path.parts and not any(path.is_relative_to(one) for one in others)
        for path, _ in files
    )


def _full(image_shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*image_shape, 1)[:3]
