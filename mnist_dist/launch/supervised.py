"""What `python -m mnist_dist.launch` tells its processes."""

from collections.abc import Sequence

from mnist_dist.base.errors import UserError
from mnist_dist.launch.address import meeting_addresses
from mnist_dist.launch.hosts import format_hosts, parse_hosts
from mnist_dist.launch.topology import Step, Topology
from mnist_dist.launch.variables import MAX_ID, Variables

SUPERVISED_NAMES = ("MNIST_DIST_RANK", "MNIST_DIST_HOSTS", "MNIST_DIST_JOB", "MNIST_DIST_START")
_RANK, _HOSTS, _JOB, _START = SUPERVISED_NAMES
_NAME = "mnist_dist.launch"


def describe_rank(rank: int, hosts: Sequence[str], *, job: int, start: int) -> dict[str, str]:
    """The variables for a process; `hosts` are those of all ranks, `job` a number of its own, `start` which restart."""
    return dict(zip(SUPERVISED_NAMES, (str(rank), format_hosts(hosts), str(job), str(start)), strict=True))


def read_supervised(env: Variables) -> Topology:
    """The topology that these variables describe; ranks are numbered host by host."""
    launcher = f"python -m {_NAME}"
    given = next(name for name in SUPERVISED_NAMES if name in env)
    env.check_complete(SUPERVISED_NAMES, given=given, launcher=launcher)
    hosts = tuple(host for host, slots in env.parsed(_HOSTS, parse_hosts).items() for _ in range(slots))
    rank, job, start = (env.number(name, maximum=MAX_ID) for name in (_RANK, _JOB, _START))
    if rank >= len(hosts):
        raise UserError(
            f"{env.shown(_RANK)}, but {env.shown(_HOSTS)} means {len(hosts)} processes; start the job with {launcher}"
        )
    step = Step(
        hosts=hosts,
        meeting_addresses=meeting_addresses(hosts[0], job * 31 + start),
        step_id=f"launch.{job}.{start}",
        name=_NAME,
        rank_variable=_RANK,
    )
    return Topology.of_hosts(step, hosts, rank=rank)
