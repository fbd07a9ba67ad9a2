"""Search spaces: which keys of a training vary, and over which values, in the grammar of Hydra's overrides.

Nothing here searches: `mnist_dist.sweep` does, and reports show the axes.
"""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    OverrideType,
    RangeSweep,
    Sweep,
    Transformer,
)
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mnist_dist.base.errors import UserError
from mnist_dist.base.files import expand_path, read_regular
from mnist_dist.config.compose import conf_dir
from mnist_dist.config.rules import shorten

_MAX_VALUES = 1000
_NO_VALUES = "expected several values: interval(LOW,HIGH), range(START,STOP,STEP), choice(A,B) or A,B"


@dataclass(frozen=True)
class Choice:
    """Values without an order, for example names."""

    values: tuple[Any, ...]
    """As JSON has them."""
    texts: tuple[str, ...]
    """As the command line has them."""

    @property
    def edges(self) -> tuple[str, ...]:
        """The texts that say whether all values are allowed."""
        return self.texts


@dataclass(frozen=True)
class Range:
    """Equally spaced numbers, from the smallest to the largest."""

    values: tuple[float, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """As the command line has them."""
        return tuple(map(repr, self.values))

    @property
    def edges(self) -> tuple[str, ...]:
        """The texts that say whether all values are allowed."""
        return tuple(dict.fromkeys((self.texts[0], self.texts[-1])))


@dataclass(frozen=True)
class Interval:
    """All numbers between two, both included; whole numbers if these are ints."""

    low: float
    high: float
    is_log: bool = False
    """Whether orders of magnitude count the same, rather than differences."""

    @property
    def is_int(self) -> bool:
        """Whether only whole numbers count."""
        return isinstance(self.low, int)

    @property
    def edges(self) -> tuple[str, ...]:
        """The texts that say whether all values are allowed."""
        return (repr(self.low), repr(self.high))


Dimension = Choice | Range | Interval


def read_space(space: str) -> dict[str, str]:
    """The texts by key of a search space, which is not parsed yet.

    Args:
        space: a file (`path/to/file.yaml`), or the name of one in `conf/sweep/`.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    path = expand_path("space", space)
    if not space.endswith((".yaml", ".yml")):
        choices = sorted(file.stem for file in (conf_dir() / "sweep").glob("*.yaml"))
        if space not in choices:
            raise UserError(
                f"space={shorten(space)}: no such search space; choose one of {', '.join(choices)}, or give a file of "
                "your own: space=path/to/file.yaml"
            )
        path = conf_dir() / "sweep" / f"{space}.yaml"
    try:
        tree = OmegaConf.to_container(OmegaConf.create(read_regular(path).decode()))
    except OSError as error:
        raise UserError(f"space={shorten(space)}: cannot be read: {error.strerror}") from error
    except Exception as error:  # YAML, decoding, OmegaConf: each raises its own errors
        reason = shorten(" ".join(str(error).split()), 300)
        raise UserError(f"space={shorten(space)}: cannot be read as YAML: {reason}") from error
    if not isinstance(tree, dict) or not tree:
        raise UserError(
            f"space={shorten(space)}: expected lines KEY: VALUES, for example model.dropout: interval(0,0.5)"
        )
    for key, text in tree.items():
        if not isinstance(text, str):
            hint = f"; write {key!s}.NAME: VALUES for a key of this group" if isinstance(text, dict) else ""
            raise UserError(f"space={shorten(space)}: {shorten(key)}: {shorten(text)}: {_NO_VALUES}{hint}")
    return {str(key): text for key, text in tree.items()}


def parse_space(texts: Mapping[str, str]) -> dict[str, Dimension]:
    """The dimensions of a search space by key; raises UserError, naming the key, for what cannot be searched."""
    found = {}
    for key, text in texts.items():
        try:
            found[key] = parse_dimension(key, text)
        except ValueError as error:
            raise UserError(f"{shorten(key)}: {shorten(text)}: {error}") from error
    return found


def parse_dimension(key: str, text: str) -> Dimension:
    """What follows `KEY=` in Hydra's grammar for several values; raises ValueError that says what is wrong with it."""
    if spelled := re.fullmatch(r"(\s*(?:int|float)?\(?\s*interval\(.*)\s*,\s*log\s*", text):
        text = f"tag(log, {spelled[1]})"  # Hydra's own spelling
    try:
        override = OverridesParser.create().parse_override(f"{key}={text}")
        if (
            not key
            or override.key_or_group != key
            or override.type is not OverrideType.CHANGE
            or override.package is not None
        ):
            raise ValueError("this is not the name of a key")
        value = override.value()
        if isinstance(value, IntervalSweep):
            return _interval(value)
        if not isinstance(value, (ChoiceSweep, RangeSweep)):
            raise ValueError(_NO_VALUES)
        if value.tags:
            raise ValueError(f"{', '.join(sorted(map(str, value.tags)))}: goes with interval(LOW,HIGH) only")
        return _enumerate(override, value)
    except (HydraException, OmegaConfBaseException, ArithmeticError, RecursionError, TypeError) as error:
        raise ValueError(f"cannot be read ({_first_sentence(error)}); {_NO_VALUES}") from error


def _interval(found: IntervalSweep) -> Interval:
    low, high = found.start, found.end
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("both ends must be numbers")
    if not low < high:
        raise ValueError("the first number must be less than the second")
    if found.tags - {"log"}:
        raise ValueError(f"{', '.join(sorted(map(str, found.tags - {'log'})))}: the only tag is log")
    is_log = "log" in found.tags
    if is_log and low <= 0:
        raise ValueError("with log the first number must be more than 0")
    return Interval(low, high, is_log)


def _enumerate(override: Override, found: ChoiceSweep | RangeSweep) -> Choice | Range:
    found.shuffle = False  # the same command must give the same trials
    values = list(itertools.islice(override.sweep_iterator(), _MAX_VALUES + 1))
    if not values:
        raise ValueError("has no values")
    if len(values) > _MAX_VALUES:
        raise ValueError(f"more than {_MAX_VALUES} values; write interval(LOW,HIGH) or int(interval(LOW,HIGH))")
    if isinstance(found, RangeSweep):
        return Range(tuple(sorted(value for value in values if isinstance(value, (int, float)))))
    if any(isinstance(value, Sweep) for value in values):
        raise ValueError(f"values cannot be mixed; {_NO_VALUES}")
    texts = tuple(Transformer.str(value) for value in values)
    if len(set(texts)) < len(texts):
        raise ValueError("a value is given twice")
    parse = OverridesParser.create().parse_override
    return Choice(tuple(parse(f"key={text}").value() for text in texts), texts)


def _first_sentence(error: Exception) -> str:
    return shorten(str(error).strip().partition("\n")[0] or type(error).__name__, 120)
