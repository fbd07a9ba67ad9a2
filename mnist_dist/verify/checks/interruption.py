"""Check 10: does a training continue from a checkpoint of this job, on this file system, to the same bits?"""

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mnist_dist.base.array import Array
from mnist_dist.engine.build import Engine, Programs
from mnist_dist.results.history import EpochMetrics, History
from mnist_dist.run.checkpoint import DATA_DIGEST, Checkpoint, CheckpointFolder, ResumePoint
from mnist_dist.verify.checks.base import Detector, Evidence, Finding, by_replica, names_of
from mnist_dist.verify.checks.equality import first_steps, rates, state_digests
from mnist_dist.verify.context import Context

_STEPS = 10
_FOLDER = "verify-checkpoints"


class Interruption(Detector):
    """Saves, loads and trains on; and offers damaged copies, which must be refused."""

    name = "interruption"
    needs = ("identity", "collectives", "data", "cross_examination")

    def measure(self, context: Context) -> Evidence:
        """Digests after training through, and after resuming in the middle; on rank 0 what came of the files."""
        engine = context.assemble()
        context.enter("training without an interruption")
        programs, indices, learning_rates = Programs(engine), first_steps(engine, 2 * _STEPS), rates(engine, 2 * _STEPS)
        programs.train_epoch(indices[:_STEPS], learning_rates=learning_rates[:_STEPS])
        arrays = engine.state.to_arrays()
        programs.train_epoch(indices[_STEPS:], learning_rates=learning_rates[_STEPS:])
        through = state_digests(engine)

        context.enter("writing and reading a checkpoint")
        files: dict[str, Any] = {}
        loaded: Mapping[str, Array] | None = None
        if context.topology.is_chief:
            files, loaded = _try_files(context.folder / _FOLDER, _checkpoint(engine, arrays))
        is_loaded = context.settle(loaded is not None, lambda values: values[0])
        if not is_loaded:
            return {"through": through, "resumed": [], "files": files}
        context.enter("training on from the checkpoint")
        # Only rank 0 has read it; the others get its state.
        resumed = context.assemble(restored=loaded)
        Programs(resumed).train_epoch(indices[_STEPS:], learning_rates=learning_rates[_STEPS:])
        return {"through": through, "resumed": state_digests(resumed), "files": files}

    def judge(self, evidence: Sequence[Evidence]) -> Finding:
        """The same bits, and no damaged file."""
        files = evidence[0]["files"]
        details = {key: files[key] for key in ("write_s", "read_s", "bytes")}
        if files["problem"]:
            text = f"the checkpoint that rank 0 has just written {files['problem']}"
            return Finding("fail", text, {0: text}, details)
        if accepted := [kind for kind, is_refused in files["refused"].items() if not is_refused]:
            text = f"a checkpoint that is {' and one that is '.join(accepted)} was taken for a good one"
            return Finding("fail", text, {0: text}, details)
        through = by_replica(evidence, "through")
        resumed = by_replica(evidence, "resumed")
        wrong = [index for index, state in enumerate(resumed) if state != through[0]]
        if wrong or len(set(through)) > 1:
            blamed = {} if len(wrong) == len(resumed) else dict.fromkeys(wrong, "resumed to other bits")
            who = names_of(wrong or range(len(resumed)), "replica")
            text = f"{who} trained on from a checkpoint to other bits"
            return Finding("fail", text, blamed, details, of="replica")
        size, write_s, read_s = files["bytes"] / 1e6, files["write_s"], files["read_s"]
        summary = (
            f"resumed to the same bits; a flipped byte and a truncated file were refused; {size:.1f} MB written in "
            f"{1e3 * write_s:.0f} ms, read in {1e3 * read_s:.0f} ms"
        )
        return Finding("pass", summary, {}, details)

    def spoil(self, evidence: Sequence[Evidence]) -> int | None:
        """A damaged file is accepted."""
        evidence[0]["files"]["refused"]["truncated"] = False
        return 0


def _checkpoint(engine: Engine, arrays: Mapping[str, Array]) -> Checkpoint:
    """As a training writes it after its first epoch."""
    row = EpochMetrics(1, loss=0.0, accuracy=0.0, val_loss=0.0, val_accuracy=0.0, learning_rate=0.0, epoch_s=0.0,
                       images_per_s=0.0)  # fmt: skip
    point = ResumePoint(
        History((row,)),
        fingerprint={DATA_DIGEST: ""},
        num_replicas=engine.strategy.num_replicas,
        global_batch_size=engine.plan.global_batch_size,
    )
    return Checkpoint(point, dict(arrays))


def _try_files(path: Path, checkpoint: Checkpoint) -> tuple[dict[str, Any], Mapping[str, Array] | None]:
    """Write the checkpoint, read it back, and offer damaged copies; the loaded state, if it is what was written."""
    folder = CheckpointFolder(path)
    files: dict[str, Any] = {"problem": "", "refused": {}, "write_s": 0.0, "read_s": 0.0, "bytes": 0}
    state: Mapping[str, Array] | None = None
    try:
        start = time.perf_counter()
        folder.save(checkpoint, keep=1)
        files["write_s"] = time.perf_counter() - start
        (file,) = path.glob("*.ckpt")
        files["bytes"] = file.stat().st_size
        _drop_from_cache(file)
        start = time.perf_counter()
        content = file.read_bytes()
        state = Checkpoint.from_bytes(content).state
        files["read_s"] = time.perf_counter() - start
        if any(not np.array_equal(state[name], array) for name, array in checkpoint.state.items()):
            files["problem"], state = "reads back as another state", None
        for kind, damage in _DAMAGES.items():
            file.write_bytes(damage(content))
            files["refused"][kind] = _is_refused(file)
    except (OSError, ValueError) as error:
        files["problem"], state = f"cannot be used: {error}", None
    finally:
        shutil.rmtree(path, ignore_errors=True)
    return files, state


def _flip(content: bytes) -> bytes:
    damaged = bytearray(content)
    damaged[len(damaged) // 2] ^= 1
    return bytes(damaged)


_DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped in one bit": _flip,
    "truncated": lambda content: content[: 2 * len(content) // 3],
}


def _is_refused(file: Path) -> bool:
    try:
        Checkpoint.from_bytes(file.read_bytes())
    except ValueError:
        return True
    return False


def _drop_from_cache(file: Path) -> None:
    """Ask for what is on the disk, as far as the file system follows the advice."""
    with file.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
