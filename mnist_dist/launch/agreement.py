"""Whether all processes of a job agree on what to train: checked once, before anything is started or written."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from mnist_dist import __version__
from mnist_dist.base.errors import EnvironmentProblem, UserError
from mnist_dist.base.surroundings import ARITHMETIC_VARIABLES, arithmetic_variables
from mnist_dist.base.versions import installed_version
from mnist_dist.launch.rendezvous import Rendezvous

_OF_MACHINES = ("version of ", "number of GPUs", *ARITHMETIC_VARIABLES)


@dataclass(frozen=True)
class Report:
    """What a process tells the others."""

    facts: dict[str, str] = field(default_factory=dict)
    """What must be the same on all ranks: configuration, data, versions."""
    gpus: list[str] = field(default_factory=list)
    """UUIDs of the GPUs that the process will use; no other rank may use them."""
    is_finished: bool = False
    """Whether the run folder holds this run, finished; what the chief says counts."""
    resume_point: str = ""
    """Where the run resumes (`ResumePoint.to_json`), if it does; what the chief says counts."""
    watch_address: str = ""
    """`peers.PeerWatch.address`; what the chief says counts."""
    host: str = field(default_factory=platform.node)
    """The name of its machine."""
    error: str | None = None
    """Why the process cannot take part."""


def job_facts(keys: Mapping[str, str], *, num_gpus: int) -> dict[str, str]:
    """What must be the same on all processes: `keys`, software, number of GPUs, variables that affect arithmetic."""
    versions = {f"version of {name}": installed_version(name) or "none" for name in ("tensorflow", "horovod")}
    return {
        **keys,
        "version of mnist_dist": __version__,
        **versions,
        "number of GPUs": str(num_gpus),
        **arithmetic_variables(),
    }


def agree(report: Report, rendezvous: Rendezvous) -> list[Report]:
    """Compare the reports of all ranks and return them, the chief's first; every process calls this.

    Raises:
        UserError: a rank did not come, cannot take part, or differs; the message names rank and key.
    """
    texts = rendezvous.exchange(json.dumps(asdict(report)))
    reports = [Report(**json.loads(text)) for text in texts]
    for rank, other in enumerate(reports):
        if other.error is not None and rank != rendezvous.topology.rank:
            raise UserError(f"rank {rank} cannot take part: {other.error}")
    _check_equal([report.facts for report in reports])
    check_not_shared([report.gpus for report in reports])
    return reports


def find_disagreement(facts: Sequence[Mapping[str, str]]) -> str | None:
    """The first difference between rank 0's facts and another rank's, in words that name rank and key; or None."""
    first = facts[0]
    for rank, other in enumerate(facts):
        for key in sorted({*first, *other}):
            if first.get(key) != other.get(key):
                return f"rank {rank} has {key}={other.get(key)}, rank 0 has {key}={first.get(key)}"
    return None


def _check_equal(facts: Sequence[Mapping[str, str]]) -> None:
    problem = find_disagreement(facts)
    if problem is None:
        return
    of_machines = [{key: value for key, value in one.items() if key.startswith(_OF_MACHINES)} for one in facts]
    # Software and devices do not depend on what the user typed.
    kind = EnvironmentProblem if problem == find_disagreement(of_machines) else UserError
    raise kind(f"the processes of this job do not agree: {problem}; start all of them the same way")


def check_not_shared(gpus: Sequence[Sequence[str]]) -> None:
    """Raise EnvironmentProblem if two ranks use the same GPU, naming both."""
    owners: dict[str, int] = {}
    for rank, uuids in enumerate(gpus):
        for uuid in uuids:
            if owners.setdefault(uuid, rank) != rank:
                raise EnvironmentProblem(
                    f"ranks {owners[uuid]} and {rank} both use the GPU {uuid}; give each process its own GPU "
                    "(CUDA_VISIBLE_DEVICES; in slurm/train.sh as many #SBATCH --gpus-per-node as --ntasks-per-node)"
                )
