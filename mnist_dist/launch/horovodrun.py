"""What horovodrun tells its processes."""

from mnist_dist.base.errors import UserError
from mnist_dist.launch.address import host_name, ipv6_address, join_address
from mnist_dist.launch.topology import HorovodRun, Topology
from mnist_dist.launch.variables import Variables

HOROVOD_NAMES = ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE")
_STORE_NAMES = ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT")


def read_horovodrun(env: Variables) -> Topology:
    """The topology that horovodrun's variables describe."""
    given = next(name for name in HOROVOD_NAMES if name in env)
    env.check_complete(HOROVOD_NAMES, given=given, launcher="horovodrun")
    rank, local_rank = (env.number(name) for name in ("HOROVOD_RANK", "HOROVOD_LOCAL_RANK"))
    size, local_size = (env.number(name, minimum=1) for name in ("HOROVOD_SIZE", "HOROVOD_LOCAL_SIZE"))
    # Used only by Horovod, which would wait for nodes that do not exist.
    node, num_nodes = env.number("HOROVOD_CROSS_RANK", default=0), env.number("HOROVOD_CROSS_SIZE", default=1)
    fits = (
        rank < size and local_rank < local_size <= size and local_rank <= rank,
        node < num_nodes <= size - local_size + 1,
    )
    if not all(fits):
        names = [name for name in (*HOROVOD_NAMES, "HOROVOD_CROSS_RANK", "HOROVOD_CROSS_SIZE") if name in env]
        values = ", ".join(f"{name}={env[name]}" for name in names)
        raise UserError(f"{values}: these contradict each other; start the job with horovodrun")
    store = None
    if size > 1 or any(name in env for name in _STORE_NAMES):
        env.check_complete(_STORE_NAMES, given="HOROVOD_RANK", launcher="horovodrun")
        host = env.parsed(
            _STORE_NAMES[0], lambda text: ipv6_address(text.strip("[]")) if ":" in text else host_name(text)
        )
        store = join_address(host, env.number(_STORE_NAMES[1], minimum=1, maximum=65_535))
    return Topology(HorovodRun(store), rank, size, local_rank, local_size)
