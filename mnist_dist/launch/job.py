"""This process's part in its job: how it meets the others, notices that one is lost, and is asked to stop."""

import contextlib
from collections.abc import Iterator
from types import TracebackType

from mnist_dist.base.errors import UserError
from mnist_dist.launch.agreement import Report, agree
from mnist_dist.launch.peers import PeerWatch
from mnist_dist.launch.reception import RankTaken
from mnist_dist.launch.rendezvous import Rendezvous
from mnist_dist.launch.stop import StopRequest
from mnist_dist.launch.topology import Topology


class Job:
    """A context manager for the main thread, from the first line of a run to its last."""

    def __init__(self, topology: Topology, *, timeout_s: float) -> None:
        """Let the processes wait for each other for `timeout_s` seconds."""
        self.topology = topology
        self.peers = PeerWatch(topology)
        self.rendezvous = Rendezvous(topology, timeout_s=timeout_s)
        self.stop_request = StopRequest(tell_others=self.peers.tell_why, has_others=topology.world_size > 1)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Job":
        self._stack.enter_context(self.stop_request)
        self._stack.enter_context(self.rendezvous)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    @contextlib.contextmanager
    def telling_errors(self) -> Iterator[None]:
        """A block before all ranks have met: a UserError raised in it is reported to the other ranks."""
        try:
            yield
        except RankTaken:
            raise  # this process is not part of the job
        except UserError as error:
            with contextlib.suppress(UserError):  # the error to show is the one of this process
                agree(Report(error=str(error)), self.rendezvous)
            raise
