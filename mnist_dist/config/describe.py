"""Every key of a configuration with its value, range and meaning, as its dataclass states them."""

import ast
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf


class Key(NamedTuple):
    """A key that a user may set."""

    name: str
    value: str
    """As the composed configuration has it."""
    values: str
    """Its range; empty if the type says it all."""
    meaning: str


def describe_keys(composed: DictConfig, prefix: str = "") -> Iterator[Key]:
    """All keys of a composed configuration, in order, except those that are set by a choice."""
    schema: Any = OmegaConf.get_type(composed)
    meanings = _docstrings(schema)
    for field in fields(schema):
        node = composed._get_node(field.name)
        if isinstance(node, DictConfig) and is_dataclass(OmegaConf.get_type(node)):
            yield from describe_keys(node, f"{prefix}{field.name}.")
        elif field.name != "name":
            value = OmegaConf.select(composed, field.name)
            shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            rule = field.metadata.get("rule")
            values = rule.words.removeprefix("must be ") if rule else ""
            yield Key(prefix + field.name, shown, values, meanings.get(field.name, ""))


def _docstrings(schema: type) -> dict[str, str]:
    """The text below each field of a dataclass, inherited fields included."""
    found: dict[str, str] = {}
    for base in filter(is_dataclass, reversed(schema.__mro__)):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for statement, below in itertools.pairwise(definition.body):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[statement.target.id] = str(below.value.value)
    return found
