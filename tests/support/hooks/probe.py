"""Runs `mnist_dist.train` as usual and, when it is over, reports what this process did.

Writes a file `rank-N.json` to the folder `PROBE_DIR`, with the digests of this process's trained weights, of the
other weights (moving averages) and of the optimizer's slots for each of its replicas, and the files that it opened for
writing below its run folder.

`PROBE_FLIP=2:1:weights` or `2:1:slot` simulates a faulty device: after epoch 2, before replicas are compared, one bit
of replica 1's weights or of its last optimizer slot changes.
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

from mnist_dist import train  # noqa: E402  (only now: imports are watched as well)
from mnist_dist.launch.environment import read_topology  # noqa: E402
from mnist_dist.results.sums import weights_digest  # noqa: E402

build = train.build
engines = []


def catch(*arguments):
    """Get hold of the engine when it is built; there is no other way."""
    engines.append(build(*arguments))
    if fault := os.environ.get("PROBE_FLIP"):
        epoch, replica, what = fault.split(":")
        flip_a_bit(int(epoch), int(replica), what=what)
    return engines[0]


def flip_a_bit(in_epoch: int, replica: int, *, what: str) -> None:
    from mnist_dist.engine.programs.replica_check import ReplicaCheck
    from support.faulty_device import flip_bit_of_replica  # not before TensorFlow may start

    check = ReplicaCheck.run

    def flip_then_check(self, epoch):
        if epoch == in_epoch:
            (engine,) = engines
            variable = engine.state.weights if what == "weights" else engine.state.slots[-1]
            flip_bit_of_replica(engine.strategy, variable, replica)
        return check(self, epoch)

    ReplicaCheck.run = flip_then_check


def digests(variable) -> list[str]:
    return [weights_digest(copy) for copy in engines[0].strategy.copies(variable)]


train.build = catch

try:
    train.main()
finally:
    state = engines[0].state if engines else None
    report = {
        "weights_sha256": digests(state.weights) if state else [],
        "averages_sha256": [digests(others) for others in state.model[1:]] if state else [],
        "slots_sha256": [digests(slot) for slot in state.slots] if state else [],
        "opened": opened,
    }
    path = Path(os.environ["PROBE_DIR"], f"rank-{read_topology().rank}.json")
    path.write_text(json.dumps(report))
