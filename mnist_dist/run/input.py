"""What a run reads before any process starts TensorFlow: its folder, its data, the reference curves."""

import os
from dataclasses import asdict, dataclass, replace

from mnist_dist.base.errors import EnvironmentProblem, UserError
from mnist_dist.base.files import describe_os_error, expand_path
from mnist_dist.config.compare import job_keys
from mnist_dist.config.train import TrainConfig
from mnist_dist.data.dataset import ImageDataset
from mnist_dist.data.load import load_dataset
from mnist_dist.data.splits import check_val_fraction
from mnist_dist.launch.agreement import Report, agree, job_facts
from mnist_dist.launch.gpus import own_uuids
from mnist_dist.launch.job import Job
from mnist_dist.launch.losses import LOSSES_VARIABLE, Loss, read_losses
from mnist_dist.launch.topology import Topology
from mnist_dist.results.reference import Reference, load_reference
from mnist_dist.run.checkpoint import DATA_DIGEST, ResumePoint
from mnist_dist.run.folder import RUN_FOLDERS, TENSORBOARD, RunFolder
from mnist_dist.run.lock import Holder, read_holder
from mnist_dist.run.resume import FoundRun, inspect, settle

# How long a process may take to end whose job has lost another one: Slurm kills it after KillWait (30 s by default),
# but one that waits for a file system ends later, and so may its lock.
_ENDING_S = 90.0


@dataclass(frozen=True)
class RunInput:
    """The same on all processes of a job, except for what only the chief finds in the run folder."""

    config: TrainConfig
    """With `data=auto` resolved; once all have agreed, also with what the run to resume has settled."""
    dataset: ImageDataset
    reference: Reference | None
    gpus: list[str]
    """UUIDs of this process's GPUs."""
    found: FoundRun
    losses: tuple[Loss, ...]
    """What this job has lost before this start; on the chief only."""
    watch_address: str = ""
    """Rank 0's address for the watch over all processes (`peers.PeerWatch`), once all have agreed."""
    hosts: tuple[str, ...] = ()
    """The machine of each rank, once all have agreed."""


def read_input(asked: TrainConfig, job: Job, run_folder: RunFolder) -> RunInput:
    """Read everything; raises UserError for whatever this process can see is wrong."""
    job.rendezvous.hold_own_port()
    folders = (*RUN_FOLDERS, TENSORBOARD) if asked.tensorboard else RUN_FOLDERS
    run_folder.check_usable(may_resume=asked.resume == "auto", folders=folders)
    losses = claim(run_folder, job.topology)
    reference = load_reference(asked.plots.reference)
    dataset = load_dataset(asked.data)
    check_val_fraction(len(dataset.x_train), asked.data.val_fraction)
    asked.augment.check_image_shape(dataset.x_train.shape[1:])
    config = replace(asked, data=replace(asked.data, name=dataset.name))
    found = inspect(run_folder, config, data_sha256=dataset.sha256)
    if job.topology.is_chief and found.point is None:
        _check_pretrained(asked.model.pretrained)
    return RunInput(config, dataset, reference, own_uuids(job.topology), found, losses)


def claim(run_folder: RunFolder, topology: Topology) -> tuple[Loss, ...]:
    """Keep other jobs out of the folder; returns what this job has lost before this start.

    If it has, a process of an earlier start may still hold the folder: one that is ending, or one on a lost machine.
    """
    if not topology.is_chief:
        return ()
    try:
        losses = read_losses(topology.losses)
    except OSError as error:
        reason = describe_os_error(error)
        raise EnvironmentProblem(f"{LOSSES_VARIABLE}={topology.losses}: cannot be read: {reason}") from error
    try:
        is_lost = read_holder(run_folder.path).is_lost(topology.losses, losses)
    except OSError as error:
        raise EnvironmentProblem(f"run_dir={run_folder.path}: cannot be read: {describe_os_error(error)}") from error
    holder = Holder(topology.node_name(), str(topology.losses or ""), len(losses))
    run_folder.claim(holder, wait_s=_ENDING_S if losses else 0.0, holder_is_lost=is_lost)
    return losses


def start_timeout_s(config: TrainConfig, topology: Topology) -> float:
    """How long this process waits for the others: also while rank 0 waits in `claim`."""
    if topology.is_chief or topology.losses is None or not os.path.exists(topology.losses):  # noqa: PTH110 (raises not)
        return config.strategy.start_timeout_s
    return config.strategy.start_timeout_s + _ENDING_S


def _check_pretrained(name: str | None) -> None:
    if name is not None and not expand_path("model.pretrained", name).is_file():
        raise UserError(f"model.pretrained={name}: no such file; give the path of a model.keras")


def agree_on_input(own: RunInput, job: Job) -> RunInput:
    """The input with what the chief has found, once all processes agree; raises UserError if they do not."""
    keys = {**job_keys(asdict(own.config)), DATA_DIGEST: own.dataset.sha256}
    report = Report(
        facts=job_facts(keys, num_gpus=len(own.gpus)),
        gpus=own.gpus,
        is_finished=own.found.is_finished,
        resume_point=own.found.point.to_json() if own.found.point else "",
        watch_address=job.peers.address,
        host=job.topology.node_name(),
    )
    reports = agree(report, job.rendezvous)
    chief = reports[0]
    point = ResumePoint.from_json(chief.resume_point) if chief.resume_point else None
    return replace(
        own,
        config=settle(own.config, point),
        found=FoundRun(point, own.found.checkpoint, is_finished=chief.is_finished),
        watch_address=chief.watch_address,
        hosts=tuple(other.host for other in reports),
    )
