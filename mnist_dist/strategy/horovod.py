"""Several processes, one replica each, by Horovod's plain collectives.

`horovod.tensorflow.keras` must not be used: under Keras 3 its optimizer silently does not reduce.
"""

import json
import os
import threading
from typing import Any

import tensorflow as tf

from mnist_dist.base.array import Array
from mnist_dist.base.errors import EnvironmentProblem
from mnist_dist.launch.gpus import own_share
from mnist_dist.launch.interfaces import LOOPBACK, check_interface, interface_towards, meeting_point
from mnist_dist.launch.ports import listen_anywhere
from mnist_dist.launch.rendezvous import Rendezvous
from mnist_dist.launch.topology import Step, Topology
from mnist_dist.strategy.base import SingleDevice

# Horovod's own settings, measured for one message per step between 2 CPU ranks: without its cache of agreed names,
# which is meant for hundreds of messages, an all-reduce of 1.08 MB takes 1.6 ms instead of 4. And Gloo would give up
# after 30 s, even if the whole job was suspended; the watch over the processes finds a lost one anyway. The user's own
# settings stay.
_SETTINGS = {"HOROVOD_CACHE_CAPACITY": "0", "HOROVOD_CYCLE_TIME": "0.5", "HOROVOD_GLOO_TIMEOUT_SECONDS": "864000"}
_HOW_TO_INSTALL = "install it with: make horovod"


def load_horovod() -> Any:
    """The module `horovod.tensorflow`; EnvironmentProblem if it is missing or does not match."""
    try:
        import horovod.tensorflow as hvd
    except ModuleNotFoundError as error:
        raise EnvironmentProblem(f"strategy=horovod: Horovod is not installed; {_HOW_TO_INSTALL}") from error
    except (ImportError, tf.errors.NotFoundError) as error:
        reason = " ".join(str(error).split())[:300]
        raise EnvironmentProblem(
            f"strategy=horovod: Horovod was not built for the installed TensorFlow {tf.__version__} ({reason}); "
            f"build it again: make horovod"
        ) from error
    return hvd


class Horovod(SingleDevice):
    """This process's only device, together with those of the other processes."""

    name = "horovod"
    has_all_to_all = True
    has_xla_collectives = False

    def __init__(self, rendezvous: Rendezvous) -> None:
        """Start Horovod; if srun launched the processes, do horovodrun's part too."""
        topology = rendezvous.topology
        self._hvd = load_horovod()
        gpus = tf.config.list_physical_devices("GPU")
        if gpus:
            tf.config.set_visible_devices(gpus[own_share(len(gpus), topology)[0]], "GPU")
        _settle_variables(topology)
        if isinstance(topology.launcher, Step):
            self._server = _launch(rendezvous, topology.launcher.hosts)
        self._hvd.init()
        super().__init__()
        self.num_replicas = self._hvd.size()

    def create_variable(self, value: Array) -> tf.Variable:
        """A plain variable with rank 0's value."""
        return super().create_variable(self._hvd.broadcast(tf.convert_to_tensor(value), root_rank=0))

    def is_lost_touch(self, error: tf.errors.OpError) -> bool:
        """Horovod raises one kind of error for everything."""
        return isinstance(error, tf.errors.UnknownError) and "Horovod" in error.message

    def replica_index(self) -> int:
        """This process's rank."""
        return int(self._hvd.rank())

    def all_reduce_sum(self, bucket: tf.Tensor) -> tf.Tensor:
        """Horovod's all-reduce: NCCL if it is built in, otherwise Gloo."""
        return self._hvd.allreduce(bucket, op=self._hvd.Sum, name=_name("sum", bucket))

    def all_gather(self, rows: tf.Tensor) -> tf.Tensor:
        """Horovod's all-gather."""
        gathered = self._hvd.allgather(rows, name=_name("gather", rows))
        return tf.ensure_shape(gathered, [self.num_replicas * rows.shape[0], *rows.shape[1:]])

    def all_to_all(self, rows: tf.Tensor) -> tf.Tensor:
        """Horovod's all-to-all."""
        return tf.ensure_shape(self._hvd.alltoall(rows, name=_name("exchange", rows)), rows.shape)


def _settle_variables(topology: Topology) -> None:
    """Give Horovod's variables the values it needs; raises EnvironmentProblem for an interface that does not exist."""
    for name in [name for name, value in os.environ.items() if name.startswith("HOROVOD_") and not value.strip()]:
        os.environ.pop(name)
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    # The only ones that are built in, for control messages and for sums on CPUs.
    os.environ.update(HOROVOD_CONTROLLER="gloo", HOROVOD_CPU_OPERATIONS="gloo")
    check_interface(topology.interface)


def _launch(rendezvous: Rendezvous, hosts: tuple[str, ...]) -> Any:
    """What horovodrun does for its processes, done by the processes themselves, without MPI or ssh.

    Rank 0 serves Horovod's own store, where the ranks look up each other's addresses, and tells the others where.
    """
    topology = rendezvous.topology
    server, place = None, ""
    if topology.is_chief:
        server, host, port = _serve_store(topology, hosts)
        place = json.dumps([host, port])
    host, port = json.loads(rendezvous.exchange(place, topic="horovod")[0])
    os.environ.update(describe_process(topology, hosts))
    os.environ.update(HOROVOD_GLOO_RENDEZVOUS_ADDR=host, HOROVOD_GLOO_RENDEZVOUS_PORT=str(port))
    # The network between the nodes, if there are several nodes; a choice of the user's takes precedence.
    far = next((host for host in hosts if host != hosts[topology.rank]), hosts[0])
    if interface := interface_towards(meeting_point(far, topology)):
        os.environ.setdefault("HOROVOD_GLOO_IFACE", interface)
    return server


def _serve_store(topology: Topology, hosts: tuple[str, ...]) -> tuple[Any, str, int]:
    """Horovod's store, and the host and port where it is reached; it answers anybody who can connect to it."""
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

    # Horovod's own RendezvousServer would listen on all interfaces.
    server = RendezvousHTTPServer((LOOPBACK, 0), RendezvousHandler, 0)
    server.daemon_threads = True  # strangers who keep connecting do not keep this process from ending
    server.handle_error = lambda request, address: None  # a stranger's connection broke
    server.socket.close()
    server.socket, host, port = listen_anywhere(meeting_point(hosts[0], topology))
    slots = ",".join(f"{name}:{hosts.count(name)}" for name in dict.fromkeys(hosts))
    server.init(get_host_assignments(parse_hosts(slots), topology.world_size))
    threading.Thread(target=server.serve_forever, name="store", daemon=True).start()
    return server, host, port


def describe_process(topology: Topology, hosts: tuple[str, ...]) -> dict[str, str]:
    """Horovod's variables for this process; `hosts` are those of all ranks."""
    own = hosts[topology.rank]
    # The nodes that have a process of this local rank: not all, if nodes have different numbers of processes.
    nodes = [host for host in dict.fromkeys(hosts) if hosts.count(host) > topology.local_rank]
    return {
        "HOROVOD_RANK": str(topology.rank),
        "HOROVOD_SIZE": str(topology.world_size),
        "HOROVOD_LOCAL_RANK": str(topology.local_rank),
        "HOROVOD_LOCAL_SIZE": str(topology.local_size),
        "HOROVOD_CROSS_RANK": str(nodes.index(own)),
        "HOROVOD_CROSS_SIZE": str(len(nodes)),
        "HOROVOD_HOSTNAME": own,
    }


def _name(operation: str, tensor: tf.Tensor) -> str:
    """A name for each shape: Horovod caches what the ranks agreed on for a name, and starts over if it changes."""
    return ".".join([operation, tensor.dtype.name, *map(str, tensor.shape)])
