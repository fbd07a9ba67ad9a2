"""What is wrong with a command line, and what it could say: in words for somebody who does not know Hydra."""

import contextlib
import difflib
import io
import itertools
import sys
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from mnist_dist.config import conf_dir
from mnist_dist.errors import UserError

# What the command line can have wrong before Hydra knows what the keys mean


def check_command_line() -> None:
    """Refuse, with a UserError, what Hydra would answer with a page of usage, a grammar or a traceback."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            arguments, rest = get_args_parser().parse_known_intermixed_args()
    except SystemExit as stop:
        if not stop.code:  # --version
            raise
        _, _, problem = printed.getvalue().strip().rpartition("error: ")
        raise UserError(f"{problem}; --hydra-help lists the options") from stop
    for text in rest:
        if text.startswith("-"):
            raise UserError(f"{text}: no such option; keys are given as KEY=VALUE, without dashes (all keys: --help)")
    if arguments.multirun:
        # TensorFlow's devices and Horovod can be set up once in a process.
        raise UserError("--multirun: each run needs a process of its own; give the command once for each value")
    for text in arguments.overrides:
        _check_override(text)
    # Hydra takes KEY=VALUE on one side of the --options only; people write them in any order.
    sys.argv[1:] = [*arguments.overrides, *(text for text in sys.argv[1:] if text not in arguments.overrides)]


def _check_override(text: str) -> None:
    override = _parse_override(text)
    key, _, value = text.partition("=")
    plain = text.lstrip("+")
    if override.is_add() or override.is_force_add():
        raise UserError(f"{text}: no key can be added; to change one write {plain}")
    if override.is_delete():
        raise UserError(f"{text}: no key can be left out; to change one write KEY=VALUE")
    if override.is_sweep_override():
        raise UserError(
            f"{text}: give one value; a list needs brackets: '{key}=[{value}]', "
            f"and a text with a comma quotes of its own: \"{key}='{value}'\""
        )
    if (conf_dir() / key).is_dir() and not isinstance(override.value(), str):
        raise UserError(f"{text}: no such choice; choose one of {', '.join(p.stem for p in _choices(key))}")


def _parse_override(text: str) -> Override:
    key, equals, value = text.partition("=")
    if not text.startswith("~") and not (key and equals):
        raise UserError(f"{text if text.strip() else repr(text)}: expected KEY=VALUE (all keys: --help)")
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        # The grammar's own words are of no use to anybody who does not know it.
        raise UserError(
            f"{text}: cannot be read as KEY=VALUE; a value with blanks, brackets or other special characters needs "
            f"quotes of its own: \"{key}='{value}'\""
        ) from error


# What Hydra found wrong


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
    """KEY=VALUE as the command line has it; the key alone where it has not, as when a file gave the value."""
    key = key.partition("[")[0]  # an entry of a list
    return next((text for text in reversed(sys.argv[1:]) if text.startswith((f"{key}=", f"{key}."))), key)


def _suggest(error: OmegaConfBaseException) -> str:
    """The key that was probably meant, at the place of the wrong one or below; else all keys of that place."""
    if not is_dataclass(error.object_type):
        return "nothing can be set below it"
    prefix, _, name = str(error.full_key).rpartition(".")
    known = {key.rpartition(".")[2]: key for key in reversed(_known_keys(error.object_type))}
    matches = difflib.get_close_matches(name, known, n=1)
    if matches:
        key = ".".join(filter(None, [prefix, known[matches[0]]]))
        return "did you mean " + _given(str(error.full_key)).replace(str(error.full_key), key, 1) + "?"
    return "the keys here are " + ", ".join(_own_keys(error.object_type))


def _own_keys(schema: Any) -> list[str]:
    """Keys of a dataclass that a user may set: `name` follows from the choice."""
    return [f.name for f in fields(schema) if f.name != "name"]


def _known_keys(schema: Any) -> list[str]:
    """Dotted keys of a dataclass, its own first."""
    own = typing.get_type_hints(schema)
    below = [f"{name}.{key}" for name, hint in own.items() if is_dataclass(hint) for key in _known_keys(hint)]
    return [*own, *below]


def _kind_of_value(error: ValidationError) -> str | None:
    """What the key takes, by its type in the dataclass that has it; for an entry of a list, what the list takes."""
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


# What --help shows of conf/


def describe_choices(config_name: str) -> str:
    """A line for each choice of the groups that the configuration has, with the first line of its file's comment."""
    defaults: list[Any] = OmegaConf.select(OmegaConf.load(conf_dir() / f"{config_name}.yaml"), "defaults")
    groups = [str(group) for entry in defaults if isinstance(entry, DictConfig) for group in entry if group != "hydra"]
    files = [(f"{group}={path.stem}", path) for group in groups for path in _choices(group)]
    lines = [f"  {choice:<24} {_first_line(opening_comment(path))}".rstrip() for choice, path in files]
    return "\n".join(lines) or "  (none)"


def _choices(group: str) -> list[Path]:
    return sorted((conf_dir() / group).glob("*.yaml"))


def opening_comment(path: Path) -> str:
    """The comment that a YAML file begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return "\n".join(line[1:].strip() for line in lines if "@package" not in line)
