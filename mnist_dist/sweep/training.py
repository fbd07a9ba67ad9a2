"""One training of a trial: a process of its own, which holds the trial's claim as long as it lives."""

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mnist_dist.base.memory import count_oom_kills
from mnist_dist.launch.child import Share, start_child
from mnist_dist.launch.gpus import query_gpus, visible_uuids

_MOST_READ = 65_536


def shares(number: int, *, visible_gpus: str | None) -> list[Share]:
    """Equal shares of this process's cores and GPUs for so many trainings; all of them where there are fewer."""
    cores = list(_split(sorted(os.sched_getaffinity(0)), number))
    uuids = visible_uuids(query_gpus("uuid"), visible=visible_gpus) if number > 1 else []
    gpus = list(_split(uuids, number))
    return [
        Share(own_cores, {"CUDA_VISIBLE_DEVICES": ",".join(own_gpus)} if own_gpus else None)
        for own_cores, own_gpus in zip(cores, gpus, strict=True)
    ]


def _split(things: Sequence, number: int) -> Iterator[Sequence]:  # type: ignore[type-arg]
    for part in range(number):
        is_enough = 1 < number <= len(things)
        yield things[part * len(things) // number : (part + 1) * len(things) // number] if is_enough else ()


@dataclass
class Training:
    """A training that this process has started."""

    number: int
    """That of its trial."""
    claim: int
    """The descriptor of the trial's lock."""
    slot: int
    """Which of the shares it has."""
    log_path: Path
    process: "subprocess.Popen[bytes]"
    log_start: int
    oom_kills: int
    was_asked_to_stop: bool = False
    seen: tuple[int, int] = field(default=(0, 0))
    """Time and size of the history that was reported last."""

    @classmethod
    def start(
        cls, words: Sequence[str], log_path: Path, *, number: int, claim: int, slot: int, share: Share
    ) -> "Training":
        """Start it; raises OSError."""
        output = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            start = os.fstat(output).st_size
            process = start_child(words, output=output, inherited=(claim,), share=share)
        finally:
            os.close(output)
        return cls(number, claim, slot, log_path, process, start, count_oom_kills())

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask it to save and stop."""
        self.was_asked_to_stop = True
        if self.process.poll() is None:
            self.process.send_signal(number)

    def describe_end(self) -> str:
        """Why it has ended, in words; empty if it says nothing."""
        code = self.process.returncode
        if code == -signal.SIGKILL:
            is_known = count_oom_kills() > self.oom_kills
            return "killed by SIGKILL: out of memory" if is_known else "killed by SIGKILL (out of memory?)"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        with self.log_path.open("rb") as stream:
            stream.seek(max(self.log_start, stream.seek(0, os.SEEK_END) - _MOST_READ))
            lines = stream.read().decode(errors="replace").splitlines()
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return errors[-1] if errors else f"exit code {code}" if code else ""
