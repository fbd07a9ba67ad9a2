"""Errors in words; above all what Hydra finds wrong with a command line, for somebody who does not know Hydra."""

import difflib
import re
import sys
import typing
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from mnist_dist.base.errors import LostTouch, TrainingFailed, UserError
from mnist_dist.base.memory import describe_bytes, usable_memory
from mnist_dist.config.compose import choices_with
from mnist_dist.config.rules import shorten


def describe(error: BaseException) -> str:
    """Any error that ends a command, in one line."""
    if isinstance(error, out_of_memory()):
        what = re.sub("^{{.*?}} ", "", str(error)) or "Python could not allocate any"
        text = f"out of memory, of which this process may use {describe_bytes(usable_memory())}: {shorten(what)}"
    elif isinstance(error, (HydraException, OmegaConfBaseException)):
        text = explain(error)
    elif isinstance(error, (UserError, TrainingFailed, LostTouch)):
        text = str(error)
    elif isinstance(error, KeyboardInterrupt):
        text = "interrupted"
    else:
        text = f"{type(error).__name__}: {shorten(error, 400)}"
    return " ".join(text.splitlines())


def out_of_memory() -> tuple[type[BaseException], ...]:
    """The errors raised when memory runs out; TensorFlow's own one too, if TensorFlow was imported."""
    errors = getattr(sys.modules.get("tensorflow"), "errors", None)
    return (MemoryError, *([errors.ResourceExhaustedError] if errors else []))


def explain(error: Exception) -> str:
    """What Hydra or OmegaConf found wrong, in one line that says what to do."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={choice}: no such choice; choose one of {', '.join(error.options)}"
    cause = error
    while isinstance(cause.__cause__, (HydraException, OmegaConfBaseException)):
        cause = cause.__cause__
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        if isinstance(cause, (ConfigKeyError, ConfigAttributeError)):
            return f"{_given(cause.full_key)}: no such key; {_suggest(cause)} (all keys: --help)"
        if isinstance(cause, ValidationError) and (kind := _kind_of_value(cause)):
            return f"{_given(cause.full_key)}: must be {kind}"
        return f"{_given(cause.full_key)}: {_first_line(cause)}"
    return _first_line(cause)


def _first_line(text: object) -> str:
    """A message without what Hydra and OmegaConf append to it: search paths, types, links."""
    first, *more = str(text).strip().splitlines() or [""]
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first


def _given(key: str) -> str:
    """KEY=VALUE as the command line has it; only the key if the value came from a file."""
    key = key.partition("[")[0]  # an entry of a list
    return shorten(next((text for text in reversed(sys.argv[1:]) if text.startswith((f"{key}=", f"{key}."))), key))


def _suggest(error: OmegaConfBaseException) -> str:
    """The key that was probably meant, next to the wrong one or below it; otherwise all keys there."""
    if not is_dataclass(error.object_type):
        if str(error.full_key).startswith("model.args."):
            return "give all arguments at once: 'model.args={NAME: VALUE, ...}'"
        return "nothing can be set below it"
    if choices := choices_with(str(error.full_key)):
        return f"give {' or '.join(choices)} as well"
    prefix, _, name = str(error.full_key).rpartition(".")
    known = {key.rpartition(".")[2]: key for key in reversed(_known_keys(error.object_type))}
    matches = difflib.get_close_matches(name, known, n=1)
    if matches:
        key = ".".join(filter(None, [prefix, known[matches[0]]]))
        return "did you mean " + _given(str(error.full_key)).replace(str(error.full_key), key, 1) + "?"
    return "the keys here are " + ", ".join(_own_keys(error.object_type))


def _own_keys(schema: Any) -> list[str]:
    """The keys of a dataclass that a user may set: not `name`, which follows from the choice."""
    return [f.name for f in fields(schema) if f.name != "name"]


def _known_keys(schema: Any) -> list[str]:
    """Dotted keys of a dataclass, its own first."""
    own = typing.get_type_hints(schema)
    below = [f"{name}.{key}" for name, hint in own.items() if is_dataclass(hint) for key in _known_keys(hint)]
    return [*own, *below]


def _kind_of_value(error: ValidationError) -> str | None:
    """What the key accepts, by its type in its dataclass; for an entry of a list, what the list accepts."""
    if is_dataclass(error.object_type):
        return _describe(typing.get_type_hints(error.object_type).get(str(error.key)), str(error.full_key))
    return _describe(error.ref_type, str(error.full_key))


def _describe(hint: Any, key: str) -> str | None:
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if type(None) in typing.get_args(hint):  # X | None
        return f"{_describe(typing.get_args(hint)[0], key)} or null"
    if typing.get_origin(hint) is list:
        return f"a list in square brackets, each entry {_describe(typing.get_args(hint)[0], key)}"
    if is_dataclass(hint):
        return "given key by key: " + ", ".join(f"{key}.{name}=..." for name in _own_keys(hint))
    return kinds.get(hint)
