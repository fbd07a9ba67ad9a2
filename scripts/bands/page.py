"""Writes the tables of docs/bands.md from `mnist_dist/verify/bands.json`: `python scripts/bands/page.py`."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mnist_dist.verify.bands import NUMBERS, Band, load_stored

PAGE = Path(__file__).resolve().parents[2] / "docs" / "bands.md"
HEADS = {
    "early_loss": "steps 2-25",
    "later_loss": "steps 26-96",
    **{f"loss_{epoch}": f"loss {epoch}" for epoch in (1, 2, 3)},
    **{f"val_loss_{epoch}": f"val loss {epoch}" for epoch in (1, 2, 3)},
    "val_correct": "val correct",
}
GROUPS = {
    "must": "**must be seen**",
    "informs": "**for information**",
    "harmless": "**no fault, must pass**",
}


def name_of(entry: dict[str, Any]) -> str:
    """What an entry is for."""
    return f"{entry['dataset']}, {entry['precision']}{' against float32' if entry['paired'] else ''}"


def bands_table(entries: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """The intervals of the numbers that are used, as people know them."""
    yield ["bands", "number", "mean", "inside", "s"]
    for entry in entries:
        for name, number in entry["numbers"].items():
            if number["used"]:
                band = Band(name, number["mean"], number["std"], entry["num_seeds"])
                show = NUMBERS[name].show_difference if entry["paired"] else NUMBERS[name].show
                low, high = (band.mean + sign * band.half_width() for sign in (-1, 1))
                yield [
                    name_of(entry),
                    NUMBERS[name].text,
                    show(band.mean),
                    f"{show(low)} to {show(high)}",
                    f"{band.std:.4f}",
                ]


def effects_table(entries: Sequence[dict[str, Any]], faults: dict[str, dict[str, str]]) -> Iterator[list[str]]:
    """For each fault the smaller one of the effects on the data sets, and how many runs it puts outside."""
    used = [name for name in NUMBERS if entries[0]["numbers"][name]["used"]]
    yield ["fault", *(f"**{head}**" if name in used else head for name, head in HEADS.items()), "caught"]
    for kind, title in GROUPS.items():
        yield [title, *[""] * (len(HEADS) + 1)]
        for fault, about in faults.items():
            if about["kind"] != kind or fault not in entries[0]["effects"]:
                continue
            found = [entry["effects"][fault] for entry in entries]
            # A training that failed has no numbers.
            moves = [
                "none" if None in pair else f"{min(pair, key=abs):.1f}".replace("-0.0", "0.0")
                for pair in zip(*(one["moves"] for one in found), strict=True)
            ]
            outside = sum(one["outcomes"].get("outside", 0) for one in found)
            total = sum(sum(one["outcomes"].values()) for one in found)
            yield [about["text"], *moves, f"{outside} of {total}"]


def hold_out_table(entries: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """Fresh seeds, and each seed of the bands judged by the others."""
    yield ["bands", "hold-out inside", "furthest number", "leave one out: inside", "needs more", "outside"]
    for entry in entries:
        fresh, left_out = entry["hold_out"], entry["leave_one_out"]
        yield [
            name_of(entry),
            f"{fresh['passed']} of {fresh['num_seeds']}",
            f"{fresh['most_deviations']} s",
            *(str(left_out.get(outcome, 0)) for outcome in ("inside", "needs_more", "outside")),
        ]


def to_markdown(rows: Iterator[list[str]]) -> str:
    """A table, the first row its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render(text: str, stored: dict[str, Any]) -> str:
    """The page with the tables between their marks."""
    entries = stored["bands"]
    alone = [entry for entry in entries if entry["precision"] == "float32"]
    paired = [entry for entry in entries if entry["paired"]]
    tables = {
        "bands": bands_table(entries),
        "effects": effects_table(alone, stored["faults"]),
        "paired effects": effects_table(paired, stored["faults"]),
        "hold-out": hold_out_table(entries),
    }
    for name, rows in tables.items():
        mark = re.compile(rf"(?<=<!-- {name} -->\n\n).*?(?=\n\n<!-- end of {name} -->)", re.DOTALL)
        table = to_markdown(rows)
        text, count = mark.subn(lambda _, table=table: table, text)
        assert count == 1, name
    return text


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(), load_stored()))
