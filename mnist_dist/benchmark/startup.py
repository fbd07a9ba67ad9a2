"""From the command to the first epoch, against a bare import of TensorFlow; with a warm and a cold file cache."""

import logging
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from json import loads
from pathlib import Path
from typing import Any

from mnist_dist.base.errors import UserError
from mnist_dist.benchmark.guard import Guard

log = logging.getLogger(__name__)

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_BARE_IMPORT = "import tensorflow, time; print(time.time())"


class CommandFailed(RuntimeError):
    """A timed command failed; the message has the end of its output."""


@dataclass
class Starts:
    """Seconds of several starts of both commands, the training and the bare import."""

    to_first_epoch_s: list[float] = field(default_factory=list)
    bare_import_s: list[float] = field(default_factory=list)
    """To the end of the import, without the interpreter's exit."""
    first_epoch_s: list[float] = field(default_factory=list)
    second_epoch_s: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The seconds and their medians, for `benchmark.json`."""
        extra = [first - second for first, second in zip(self.first_epoch_s, self.second_epoch_s, strict=True)]
        to_first_epoch_s, bare_import_s = map(statistics.median, (self.to_first_epoch_s, self.bare_import_s))
        return {
            **vars(self),
            "median_to_first_epoch_s": to_first_epoch_s,
            "median_bare_import_s": bare_import_s,
            "ratio": to_first_epoch_s / bare_import_s,
            "first_minus_second_epoch_s": statistics.median(extra),
        }


def check_cold(way: str) -> None:
    """Raise UserError if the file cache cannot be dropped in the configured way."""
    if way == "drop_caches" and not os.access(_DROP_CACHES, os.W_OK):
        raise UserError(f"startup.cold={way}: {_DROP_CACHES} is not writable here; give startup.cold=fadvise")


def measure_startup(
    folder: Path, *, overrides: list[str], repeats: int, cold: str, guard: Guard, look: Callable[[], None]
) -> dict[str, Any]:
    """Start both commands in turns; `overrides` say which data, `look` is called after each turn.

    Raises:
        CommandFailed: one of the commands ended with an error.
    """
    starts = {"warm": Starts()} | ({} if cold == "none" else {"cold": Starts()})
    # Not counted: it fills the file cache, and builds the data if necessary.
    run_once(folder / "before", overrides, Starts(), guard=guard)
    for number in range(repeats):
        for name, times in starts.items():
            for command in ("bare", "train"):
                if name == "cold":
                    drop_file_cache(cold)
                if command == "bare":
                    import_once(times, guard=guard)
                else:
                    run_once(folder / f"{name}{number}", overrides, times, guard=guard)
            look()
            log.info(
                "Start-up %d/%d, %s file cache: %.2f s to the first epoch, %.2f s for import tensorflow alone",
                *(number + 1, repeats, name, times.to_first_epoch_s[-1], times.bare_import_s[-1]),
            )
    how = {"fadvise": "posix_fadvise(DONTNEED) on Python's library and packages", "drop_caches": str(_DROP_CACHES)}
    return {
        **{name: times.to_dict() for name, times in starts.items()},
        "cold_by": how.get(cold),
        "command": "python -m mnist_dist.train trainer.epochs=2 " + " ".join(overrides),
    }


def import_once(times: Starts, *, guard: Guard) -> None:
    """Add one bare import."""
    start = time.time()
    lines = _run([sys.executable, "-c", _BARE_IMPORT], guard=guard)
    times.bare_import_s.append(float(lines[-1][1]) - start)


def run_once(run_dir: Path, overrides: list[str], times: Starts, *, guard: Guard) -> None:
    """Add one short training, watched from outside."""
    command = [sys.executable, "-m", "mnist_dist.train", *overrides, "trainer.epochs=2", f"run_dir={run_dir}"]
    start = time.time()
    ends = [when for when, line in _run(command, guard=guard) if line.startswith("Epoch ")]
    # The summary is written as soon as `total_s` is known, so its time of writing says when the run's clock began.
    summary = run_dir / "summary.json"
    timing = loads(summary.read_text())["timing"]
    first_epoch = summary.stat().st_mtime - timing["total_s"] + timing["startup_s"]
    times.to_first_epoch_s.append(first_epoch - start)
    times.first_epoch_s.append(ends[0] - first_epoch)
    times.second_epoch_s.append(ends[1] - ends[0])


def drop_file_cache(way: str) -> None:
    """Drop the files of Python and its packages from the system's file cache.

    fadvise keeps what another process has mapped at the moment; drop_caches empties the cache of the whole machine.
    """
    if way == "drop_caches":
        os.sync()
        _DROP_CACHES.write_text("3\n")
        return
    folders = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")}
    for folder in folders | {Path(__file__).resolve().parent.parent}:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(descriptor)


def _run(command: list[str], *, guard: Guard) -> list[tuple[float, str]]:
    """The lines that a command printed, each with the time (as of `time.time`) at which it came."""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        guard.watch(process.pid)
        assert process.stdout is not None
        lines = [(time.time(), line) for line in process.stdout]
        code = process.wait()
        if code != 0:
            errors.seek(0)
            last = (errors.read().strip() or "".join(line for _, line in lines)).splitlines()[-5:]
            raise CommandFailed(f"{' '.join(command[1:])} ended with exit code {code}: {' | '.join(last)}")
    return lines
