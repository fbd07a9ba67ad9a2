"""Writes the table of keys into docs/configuration.md: `python docs/make_configuration.py`."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from mnist_dist.config.compose import TRAIN, compose
from mnist_dist.config.describe import Key, describe_keys

PAGE = Path(__file__).with_name("configuration.md")
TABLE = re.compile("(?<=<!-- keys -->\n\n).*?(?=\n\n<!-- end of keys -->)", re.DOTALL)
# The default places follow from these.
PLACES = ("MNIST_DIST_CACHE", "XDG_CACHE_HOME", "KERAS_HOME")


def all_keys() -> Iterator[Key]:
    """The keys of every choice, each once."""
    keys: dict[str, Key] = {}
    for model in ("mlp", "cnn"):
        for optimizer in ("adam", "sgd"):
            for key in describe_keys(compose(TRAIN, [f"model={model}", f"optimizer={optimizer}"])):
                keys.setdefault(key.name, key)
    sections = list(dict.fromkeys(name.partition(".")[0] for name in keys))
    return iter(sorted(keys.values(), key=lambda key: sections.index(key.name.partition(".")[0])))


def build_table() -> str:
    """The table, in Markdown."""
    rows = [["key", "default", "values", "meaning"], ["---"] * 4]
    for key in all_keys():
        values = key.values.replace("2147483647", "2^31-1").replace("9223372036854775807", "2^63-1")
        rows.append([f"`{key.name}`", "" if key.value == "null" else key.value, values, key.meaning])
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


if __name__ == "__main__":
    for name in PLACES:
        os.environ.pop(name, None)
    PAGE.write_text(TABLE.sub(lambda _: build_table(), PAGE.read_text()))
