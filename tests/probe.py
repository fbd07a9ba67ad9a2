"""Runs `mnist_dist.train` as usual and, when it is over, tells what this process did.

Writes to the folder `PROBE_DIR` a file `rank-N.json` with the digest of this process's trained weights, and with the
files that it opened for writing below its run folder.
"""

import json
import os
import sys
from pathlib import Path

run_dir = next(Path(arg.partition("=")[2]).resolve() for arg in sys.argv if arg.startswith("run_dir="))
opened: list[str] = []


def watch(event: str, args: tuple) -> None:
    if event == "open" and isinstance(args[0], (str, os.PathLike)):
        path, mode, flags = args
        writes = (
            any(letter in mode for letter in "wax+") if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR)
        )
        if writes and Path(path).resolve().is_relative_to(run_dir):
            opened.append(str(path))
    elif event in ("os.mkdir", "os.rename") and Path(args[0]).resolve().is_relative_to(run_dir):
        opened.append(str(args[0]))


sys.addaudithook(watch)

from mnist_dist import train  # noqa: E402  (only now: imports are watched too)
from mnist_dist.topology import read_topology  # noqa: E402

digests: list[str] = []
weights_digest = train.weights_digest
train.weights_digest = lambda weights: digests.append(weights_digest(weights)) or digests[-1]

try:
    train.main()
finally:
    report = {"weights_sha256": digests, "opened": opened}
    path = Path(os.environ["PROBE_DIR"], f"rank-{read_topology().rank}.json")
    path.write_text(json.dumps(report))
