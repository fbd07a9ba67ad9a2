"""Networks that a function of the user's own builds."""

import contextlib
import importlib
import math
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from mnist_dist.base.errors import UserError
from mnist_dist.config.model import KerasConfig
from mnist_dist.config.rules import shorten


def build_from_factory(config: KerasConfig, *, image_shape: tuple[int, ...], seed: int) -> keras.Model:
    """Have the user's function build its network, for images of (height, width) or (height, width, channels).

    Initial weights follow `seed`, as far as the function draws them by Keras, NumPy or `random`.

    Raises:
        UserError: there is no such function, it fails, or it returns something else than an uncompiled keras.Model.
    """
    create = _find(config)
    keras.utils.set_random_seed(seed)
    with _blaming(config, "fails"):
        model = create(**(config.args or {}))
    if not isinstance(model, keras.Model):
        raise UserError(f"model.factory={config.factory}: returns {type(model).__name__}, not a keras.Model")
    if model.compiled:
        raise UserError(
            f"model.factory={config.factory}: returns a compiled model; leave out compile(): optimizer, loss and "
            "metrics are configured here"
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
            model = create(**(config.args or {}))
            if not model.built:
                model(keras.KerasTensor((1, *_full(image_shape))))
        num_weights: int = sum(math.prod(variable.shape) for variable in model.weights)
        return num_weights
    except Exception:
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
    except Exception as error:
        raise UserError(f"model.factory={config.factory}: {what}: {last_line(error)}") from error


def last_line(error: BaseException) -> str:
    """The last line of a traceback, with the place in the user's code where it happened.

    Of the error that came first, if that happened there: Keras raises others about it, which fill pages.
    """
    for one in (first_of(error), error):
        if place := _place(one):
            return f"{_say(one)} ({place})"
    return _say(error)


def first_of(error: BaseException) -> BaseException:
    """The error that came first, of those that led to this one; Keras hides it (`from None`)."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _say(error: BaseException) -> str:
    text = " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).partition("Arguments received by")[0].split())
    return shorten(f"{type(error).__name__}: {text}" if text else type(error).__name__, 300)


def _place(error: BaseException) -> str:
    """The innermost line of the traceback that is in neither this package, the standard library nor a package."""
    others = [Path(__file__).resolve().parents[1], Path(sysconfig.get_path("stdlib"))]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        is_foreign = "site-packages" in path.parts or any(path.is_relative_to(folder) for folder in others)
        if path.is_file() and not is_foreign:
            return f"{path.name}, line {frame.lineno}"
    return ""


def _full(image_shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*image_shape, 1)[:3]
