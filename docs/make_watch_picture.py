"""Draws docs/images/watch.svg, a view of a run that is under way: `python docs/make_watch_picture.py RUN_DIR`."""

import io
import re
import sys
import time
from pathlib import Path

import rich.console
from rich.terminal_theme import MONOKAI

from mnist_dist.watch import Observer, build_view

PICTURE = Path(__file__).with_name("images") / "watch.svg"


def main(run_dir: str) -> None:
    """Look until there is a pace of several epochs to show."""
    observer = Observer(Path(run_dir))
    while len((look := observer.look()).record.history.epochs) < 40:
        time.sleep(0.2)
    terminal = rich.console.Console(record=True, width=108, height=24, highlight=False, file=io.StringIO())
    terminal.print(build_view(look, terminal))
    picture = terminal.export_svg(title=f"python -m mnist_dist.watch run_dir={run_dir}", theme=MONOKAI)
    PICTURE.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL))  # a picture fetches nothing


if __name__ == "__main__":
    main(sys.argv[1])
