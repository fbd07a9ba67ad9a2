"""The rules for values. A rule is stated at its key and checked when the configuration object is created."""

from collections.abc import Callable
from dataclasses import field, fields
from typing import Any, NamedTuple

from omegaconf import MISSING

from mnist_dist.base.errors import UserError

# The range of float32 in TensorFlow: larger numbers become infinite, smaller ones are flushed to 0.
FLOAT32_MAX = (2 - 2**-23) * 2.0**127
FLOAT32_TINY = 2.0**-126
# A number from here on becomes 1 when rounded to float32.
_ROUNDS_TO_1 = 1 - 2**-25
MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1
# More shards, replicas or threads are of no use.
MAX_PARTS = 1024
_DAY_S = 86_400


class Rule(NamedTuple):
    """What a value must be."""

    allows: Callable[[Any], bool]
    words: str


class Checked:
    """A base class for configuration sections that refuses values against the rule of their key.

    Raises:
        UserError: naming key, value and rule.
    """

    section = ""
    """Prefix of the keys, including the dot."""

    def __post_init__(self) -> None:
        for key in fields(self):  # type: ignore[arg-type]
            value, rule = getattr(self, key.name), key.metadata.get("rule")
            if rule is not None:
                check(rule.allows(value), self.section + key.name, value, rule.words)


def check(condition: bool, key: str, value: object, words: str) -> None:
    """Raise UserError unless the condition holds, for rules that involve several keys."""
    if not condition:
        raise UserError(f"{key}={shorten(value)}: {words}")


def ruled(allows: Callable[[Any], bool], words: str, default: Any = MISSING) -> Any:
    """A key whose value `allows` must accept; `words` say what it accepts."""
    return field(default=default, metadata={"rule": Rule(allows, words)})


def one_of(*choices: str, words: str = "must be {}") -> Any:
    """One of these texts."""
    *most, last = choices
    return ruled(lambda value: value in choices, words.format(f"{', '.join(most)} or {last}" if most else last))


def between(low: float, high: float, *, default: Any = MISSING) -> Any:
    """A number, both ends included; None where that is the default."""
    return ruled(lambda value: value is None or low <= value <= high, f"must be from {low} to {high}", default)


def positive_float32(*, default: Any = MISSING) -> Any:
    """A number that is still positive and finite once it is rounded to float32; None where that is the default."""
    words = f"must be a positive number of float32 (from {FLOAT32_TINY:.2g} to {FLOAT32_MAX:.2g})"
    return ruled(lambda value: value is None or FLOAT32_TINY <= value <= FLOAT32_MAX, words, default)


def decay() -> Any:
    """A factor from 0 to less than 1, also once it is rounded to float32."""
    return ruled(
        lambda value: 0 <= value < _ROUNDS_TO_1, "must be at least 0 and less than 1 in float32 (at most 0.9999999)"
    )


def timeout_s() -> Any:
    """Seconds to wait: some, and at most a day."""
    return ruled(lambda value: 0 < value <= _DAY_S, f"must be more than 0 and at most {_DAY_S}")


def shorten(value: object, most: int = 200) -> str:
    """A value as text; the middle is left out if it is too long for a line."""
    text = str(value)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 4 :]}"
