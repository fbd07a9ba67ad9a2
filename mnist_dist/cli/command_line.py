"""The command line: KEY=VALUE, which Hydra composes, and a few options.

The few options here replace Hydra's own, some of which read pickles, write folders or start a job for each value.
"""

import argparse
import itertools
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from mnist_dist import __version__
from mnist_dist.base.errors import UserError
from mnist_dist.config.compose import TRAIN, conf_dir
from mnist_dist.config.describe import describe_keys
from mnist_dist.config.rules import shorten

# Folders of `conf/` that are not keys of a command: Hydra's own settings, the dataclasses, values that commands share,
# and search spaces.
_NOT_FOR_USERS = ("hydra", "schema", "defaults", "sweep")


@dataclass(frozen=True)
class CommandLine:
    """What the user typed after the name of a command."""

    overrides: tuple[str, ...]
    """Texts KEY=VALUE."""
    config_dir: str | None
    """A folder with the user's own configuration files."""
    config_name: str | None
    """One of these files, without `.yaml`."""
    shows: str | None
    """What to print instead of running: help | version | job (the configuration)."""
    resolve: bool
    """Whether to print values instead of `${...}`."""
    is_multirun: bool = False
    """Whether to train every combination of several values; the overrides are yet to be checked (`multirun.py`)."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; all keys and options: --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    add = parser.add_argument_group("Options").add_argument
    add("-h", "--help", dest="shows", action="store_const", const="help", help="print this")
    add("--version", dest="shows", action="store_const", const="version", help="print the version")
    add("-c", "--cfg", choices=["job"], dest="shows", help="print the configuration")
    add("-r", "--resolve", action="store_true", help="with --cfg or --help: values instead of ${...}")
    add("-cd", "--config-dir", metavar="FOLDER", help="a folder with your own configuration files")
    add("-cn", "--config-name", metavar="NAME", help="the file in that folder to start from, without .yaml")
    add("-m", "--multirun", action="store_true", help="train, one process: every combination of KEY=A,B, one by one")
    return parser


def parse_command_line(arguments: Sequence[str], *, command: str) -> CommandLine:
    """Read the words after the name of the `command`; raises UserError for whatever must not reach Hydra."""
    found, unknown = _parser().parse_known_intermixed_args(arguments)
    for text in unknown:
        if text.startswith("-"):
            raise UserError(
                f"{shorten(text)}: no such option; keys are given as KEY=VALUE, without dashes (all keys: --help)"
            )
    is_multirun = found.multirun and found.shows is None
    if is_multirun and command != TRAIN.name:
        raise UserError("--multirun: goes with mnist_dist.train only; give the command once for each value")
    if found.resolve and found.shows is None:
        raise UserError("--resolve: goes with --cfg job or --help")
    if not is_multirun:
        for text in found.overrides:
            check_override(text)
    _check_files(found.config_dir, found.config_name, command=command)
    return CommandLine(
        tuple(found.overrides), found.config_dir, found.config_name, found.shows, found.resolve, is_multirun
    )


def train_words(
    run_dir: Path, overrides: Sequence[str], *, config_dir: str | None = None, config_name: str | None = None
) -> list[str]:
    """The command that trains in `run_dir`, for a process of its own."""
    quoted = QuotedString(str(run_dir), Quote.single).with_quotes()  # a path may have any letter
    options = [f"--{name}={text}" for name, text in (("config-dir", config_dir), ("config-name", config_name)) if text]
    return [sys.executable, "-m", "mnist_dist.train", *options, *overrides, f"run_dir={quoted}"]


def _check_files(config_dir: str | None, name: str | None, *, command: str) -> None:
    if config_dir is None:
        if name not in (None, command):
            raise UserError(f"--config-name={name}: say where this file is: --config-dir=FOLDER")
        return
    folder = Path(config_dir)
    if not (config_dir and folder.is_dir()):
        raise UserError(f"--config-dir={config_dir}: no such folder")
    for ours in (path.relative_to(conf_dir()) for path in conf_dir().rglob("*.yaml")):
        if (folder / ours).exists():
            raise UserError(f"--config-dir={folder}: {ours} has the name of a file of this package; rename it")
    if name is not None and (name != Path(name).name or not (folder / f"{name}.yaml").is_file()):
        raise UserError(f"--config-name={name}: no file {name}.yaml in the folder {folder}")


def check_override(text: str) -> None:
    """Raise UserError unless `text` is KEY=VALUE with one value, for a key that may be one of ours."""
    override = parse_override(text)
    shown, plain = shorten(text), shorten(text.lstrip("+"))
    key, _, value = shown.partition("=")
    if override.package is not None or re.split("[./]", override.key_or_group)[0] in _NOT_FOR_USERS:
        raise UserError(f"{shown}: cannot be changed on the command line (all keys: --help)")
    if override.is_add() or override.is_force_add():
        raise UserError(f"{shown}: no key can be added; to change one write {plain}")
    if override.is_delete():
        raise UserError(f"{shown}: no key can be left out; to change one write KEY=VALUE")
    if override.is_sweep_override():
        raise UserError(
            f"{shown}: give one value; a list needs brackets: '{key}=[{value}]', "
            f"and a text with a comma quotes of its own: \"{key}='{value}'\""
        )
    choice, choices = override.value(), _choices(override.key_or_group)
    if choices and not (isinstance(choice, str) and choice == Path(choice).name):
        raise UserError(f"{shown}: no such choice; choose one of {', '.join(path.stem for path in choices)}")


def parse_override(text: str) -> Override:
    """What Hydra reads in `text`; raises UserError if it is not KEY=VALUE."""
    shown = shorten(text)
    key, equals, value = shown.partition("=")
    if not text.startswith("~") and not (key and equals):
        raise UserError(f"{shown if text.strip() else repr(text)}: expected KEY=VALUE (all keys: --help)")
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        # The parser's own message helps only somebody who knows its grammar.
        raise UserError(
            f"{shown}: cannot be read as KEY=VALUE; a value with blanks, brackets or other special characters needs "
            f"quotes of its own: \"{key}='{value}'\""
        ) from error
    except (ValueError, RecursionError) as error:  # Python limits the digits of a number, and nesting
        raise UserError(f"{shown}: has too many digits or brackets") from error


# What is printed instead of running


def printed(typed: CommandLine, composed: DictConfig, *, command: str) -> str:
    """What the command line asks to have printed."""
    if typed.shows == "version":
        return f"mnist_dist {__version__}"
    values = OmegaConf.to_yaml(composed, resolve=typed.resolve).rstrip()
    if typed.shows == "job":
        return values
    return f"""{_opening_comment(conf_dir() / f"{command}.yaml")}

KEY=VALUE sets a key, GROUP=CHOICE replaces a group of keys.

Groups and their choices:
{_describe_choices(command)}

Keys, with their values for this command line:

{values}

Their ranges and meanings:

{_describe_meanings(composed)}

{_parser().format_help().strip()}"""


def _describe_meanings(composed: DictConfig) -> str:
    lines = []
    for key in describe_keys(composed):
        lines.append(f"  {key.name}" + (f" ({key.values})" if key.values else ""))
        lines.append(textwrap.indent(textwrap.fill(key.meaning, 100), "      "))
    return "\n".join(lines)


def _describe_choices(command: str) -> str:
    """A line for each choice of the groups that the configuration has, with the first line of its file's comment."""
    groups = groups_of(conf_dir() / f"{command}.yaml")
    files = [(f"{group}={path.stem}", path) for group in groups for path in _choices(group)]
    lines = [f"  {choice:<24} {_opening_comment(path).partition(chr(10))[0]}".rstrip() for choice, path in files]
    return "\n".join(lines) or "  (none)"


def groups_of(path: Path) -> list[str]:
    """The groups that a file of `conf/` asks for, itself or by the file that it starts from."""
    defaults: list[Any] = OmegaConf.select(OmegaConf.load(path), "defaults") or []
    groups = []
    for entry in defaults:
        if isinstance(entry, DictConfig):
            groups += [str(group) for group in entry]
        elif (base := path.parent / f"{entry}.yaml").is_file():
            groups += groups_of(base)
    return groups


def _choices(group: str) -> list[Path]:
    return sorted(path for path in conf_dir().glob("*/*.yaml") if path.parent.name == group)


def _opening_comment(path: Path) -> str:
    """The comment that a YAML file begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return "\n".join(line[1:].strip() for line in lines if "@package" not in line)
