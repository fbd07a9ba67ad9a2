"""Writes the tables of keys into docs/configuration.md: `python docs/make_configuration.py`."""

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mnist_dist.config.compose import TRAIN, Command, compose
from mnist_dist.config.describe import Key, describe_keys
from mnist_dist.doctor.config import DoctorConfig
from mnist_dist.sweep.config import SWEEP
from mnist_dist.verify.config import VerifyConfig

PAGE = Path(__file__).with_name("configuration.md")
TABLE = re.compile("<!-- keys of ([a-z]+) -->\n\n(.*?)\n\n<!-- end of keys -->", re.DOTALL)
# They have those of `train` too.
FURTHER = {"doctor": Command("doctor", DoctorConfig), "sweep": SWEEP, "verify": Command("verify", VerifyConfig)}
# The default places follow from these.
PLACES = ("MNIST_DIST_CACHE", "XDG_CACHE_HOME", "KERAS_HOME")


def all_keys(command: str) -> Iterator[Key]:
    """The keys of every choice, each once; of other commands than `train` those that it does not have."""
    keys: dict[str, Key] = {}
    for choices in itertools.product(("mlp", "cnn", "keras"), ("adam", "adamw", "sgd"), ("none", "shift", "affine")):
        groups = [f"{group}={choice}" for group, choice in zip(("model", "optimizer", "augment"), choices, strict=True)]
        for key in describe_keys(compose(TRAIN, groups)):
            keys.setdefault(key.name, key)
    if command != TRAIN.name:
        return (key for key in describe_keys(compose(FURTHER[command], [])) if key.name not in keys)
    sections = list(dict.fromkeys(name.partition(".")[0] for name in keys))
    return iter(sorted(keys.values(), key=lambda key: sections.index(key.name.partition(".")[0])))


def build_table(command: str) -> str:
    """The table of a command, in Markdown."""
    rows = [["key", "default", "values", "meaning"], ["---"] * 4]
    for key in all_keys(command):
        values = key.values.replace("2147483647", "2^31-1").replace("9223372036854775807", "2^63-1")
        rows.append([f"`{key.name}`", "" if key.value == "null" else key.value, values, key.meaning])
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def build_page() -> str:
    """The page with all tables made anew."""

    def replace(found: re.Match[str]) -> str:
        return f"<!-- keys of {found[1]} -->\n\n{build_table(found[1])}\n\n<!-- end of keys -->"

    return TABLE.sub(replace, PAGE.read_text())


if __name__ == "__main__":
    for name in PLACES:
        os.environ.pop(name, None)
    PAGE.write_text(build_page())
