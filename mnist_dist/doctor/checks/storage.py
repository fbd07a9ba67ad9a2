"""The data set, and the file system of the run folder."""

from pathlib import Path
from typing import Any

from mnist_dist.base.memory import describe_bytes
from mnist_dist.config.data import DataConfig
from mnist_dist.config.model import ModelConfig
from mnist_dist.doctor.finding import Finding, from_message
from mnist_dist.doctor.probe import Outcome
from mnist_dist.launch.topology import Step, Topology

_NEEDED_BYTES, _COMFORTABLE_BYTES = 50e6, 500e6
_STEPS = ("path", "space", "write", "rename", "fsync of a folder", "flock")
_ELSEWHERE = "name a run_dir on another file system"


def check_pretrained(model: ModelConfig) -> list[Finding]:
    """Whether the weights to start from are here; nothing if none are asked for."""
    if model.pretrained is None or Path(model.pretrained).expanduser().is_file():
        return []
    found = f"model.pretrained={model.pretrained}: no such file"
    return [Finding("pretrained", "error", found, "give the path of a model.keras")]


def check_dataset(config: DataConfig, outcome: Outcome) -> Finding:
    """Whether the data set is here, and which it is."""
    name = "data set"
    told: dict[str, Any] | None = outcome.answers.get("dataset")
    if told is None:
        where = f" ({config.path})" if config.path else ""
        fix = "look at its file system, or give data.path= on another one; if it is only slow: timeout_s=300"
        return Finding(name, "error", f"data={config.name}{where}: loading it {outcome.describe()}", fix)
    if "error" in told:
        return from_message(name, told["error"], fix="correct this key, or give data=digits")
    if path := told.get("to_download"):
        then = ", or train on the embedded digits if it cannot" if config.name == "auto" else ""
        found = f"MNIST is not here: a training would download it to {path}{then}"
        fix = "where there is no network: data.path=mnist.npz data=mnist, or data=digits"
        return Finding(name, "warning", found, fix)
    if path := told.get("to_build"):
        return Finding(name, "ok", f"digits, not built yet: a training would build them in seconds, at {path}")
    shape = "x".join(map(str, told["shape"]))
    found = (
        f"{told['name']}, {told['num_train']:,} + {told['num_test']:,} images of {shape}, sha256 {told['sha256'][:12]}"
    )
    return Finding(name, "ok", found, facts={"data.sha256": told["sha256"]})


def check_folder(outcome: Outcome, mounts: str) -> Finding:
    """Whether runs can be written there; `mounts` is the text of /proc/self/mounts."""
    name, answers = "run folder", outcome.answers
    path = answers.get("path", "")
    kind = f" ({describe_mount(path, mounts)})" if path else ""
    if "refused" in answers:
        return from_message(name, answers["refused"], fix=f"correct this, or {_ELSEWHERE}")
    stuck = next((step for step in _STEPS if step not in answers), None)
    if stuck is not None:
        found = f"{path}{kind}: {stuck} {outcome.describe()}"
        fix = f"the file system hangs or fails: look at its server and at dmesg, or {_ELSEWHERE}"
        return Finding(name, "error", found, fix)
    space = answers["space"]
    free, files = space["free"], space["free_files"]
    found = f"{path}{kind}: {describe_bytes(free)} free"
    make_room = f"remove files, or {_ELSEWHERE}"
    if files == 0:
        return Finding(name, "error", f"{found}, but no file more can be made (inodes)", make_room)
    if free < _NEEDED_BYTES:
        return Finding(name, "error", f"{found}, and a run needs about {describe_bytes(_NEEDED_BYTES)}", make_room)
    for step in _STEPS[2:]:
        if problem := answers[step]["problem"]:
            return _problem(step, f"{path}{kind}: {step}: {problem}")
    if free < _COMFORTABLE_BYTES:
        return Finding(name, "warning", f"{found}: little", make_room)
    return Finding(name, "ok", f"{found}; write, rename, fsync ({answers['write']['seconds']:.2f} s) and flock work")


def _problem(step: str, found: str) -> Finding:
    if step == "flock":
        fix = f"mount it with locks (Lustre: flock; NFS: without nolock), or {_ELSEWHERE}"
        return Finding("run folder", "warning", f"{found}; two jobs could train there at once", fix)
    fix = f"make room or ask for more (quota -s, df -h), or {_ELSEWHERE}"
    return Finding("run folder", "error", found, fix)


def describe_mount(path: str, mounts: str) -> str:
    """Type and mount point of the file system that a path is on, without touching it."""
    best = ("", "an unknown file system")
    for line in mounts.splitlines():
        _, point, kind, *_ = [*line.split(" "), "", "", ""]
        point = point.replace("\\040", " ")
        inside = point == "/" or f"{Path(path).absolute()}/".startswith(f"{point}/")
        if point and inside and len(point) >= len(best[0]):
            best = (point, f"{kind} at {point}")
    return best[1]


def check_shared_lock(answer: str | None, outcome: Outcome, topology: Topology) -> Finding:
    """Whether this rank is refused the lock that rank 0 holds in the run folder."""
    name = "lock seen by ranks"
    if answer == "refused":
        return Finding(name, "ok", "this rank sees the lock that rank 0 holds in the run folder")
    if answer == "granted":
        found = "this rank gets the lock that rank 0 holds: two jobs on two nodes could train in one folder"
        fix = f"mount it with locks over all nodes (Lustre: flock, not localflock; NFS: no local_lock), or {_ELSEWHERE}"
        return Finding(name, "warning", found, fix)
    if answer == "absent":
        found = "this rank does not see rank 0's run folder: fine while rank 0 stays on its node"
        if topology.slurm is None and not isinstance(topology.launcher, Step):
            return Finding(name, "ok", found)
        fix = "name a run_dir on a file system that all nodes share"
        return Finding(name, "warning", f"{found}, but a job that is started again may find no checkpoint", fix)
    return Finding(name, "unknown", f"trying the lock: {answer or outcome.describe()}")
