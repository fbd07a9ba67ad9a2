"""How a rank reaches rank 0, or any process that listens at an address of the job: it knocks until one answers."""

import itertools
import socket
import time
from collections.abc import Sequence

from mnist_dist.base.errors import UserError
from mnist_dist.base.wire import Garbled, Wire
from mnist_dist.launch.address import split_address
from mnist_dist.launch.gate import Refused, enter
from mnist_dist.launch.interfaces import meeting_point
from mnist_dist.launch.reception import FIRST_TOPIC, READ_TIMEOUT_S, RankTaken, job_id, own_name
from mnist_dist.launch.secret import SAME_FOR_ALL, meeting_key
from mnist_dist.launch.topology import TFConfig, Topology

_RETRY_S = 0.2
_ANSWER_S = 15.0
_GREETING_S = 3.0  # one silent listener must not use up the time for the addresses after it
_ENDING_S = 3.0  # the server of a job that ends may still answer, or refuse, for this long
_PATIENCE_S = 3.0


class Started(ValueError):
    """TensorFlow's server answers, instead of a process that waits for others."""


def visit(
    text: str, addresses: Sequence[str], topology: Topology, *, topic: str, deadline: float, answer_s: float
) -> tuple[dict[int, str], list[str]]:
    """Knock at rank 0's addresses until it answers, then wait for the texts of all ranks.

    Args:
        text: what this rank hands in.
        addresses: where rank 0 may be.
        topology: that of this process.
        topic: what the texts are about.
        deadline: until when to knock, on the clock of `time.monotonic`.
        answer_s: seconds that rank 0 may wait for the other ranks once it has answered.

    Returns:
        The texts of all ranks, and an empty list; if rank 0 has not answered by the deadline, empty texts of all ranks
        but 0, and the addresses at which a process with another secret is.

    Raises:
        RankTaken: another process has this one's rank.
        UserError: the job has started without this process, rank 0 has ended, or, with TF_CONFIG, has another secret.
    """
    keys, failures = {one: meeting_key(topology, one) for one in addresses}, _Failures(topology)
    for address in itertools.cycle(addresses):
        try:
            wire = knock(address, text, topology, key=keys[address], topic=topic)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            failures.note(error, address)
            if time.monotonic() > deadline:
                # Only rank 0 is known to be missing: it alone would know about the others.
                break
            if address == addresses[-1]:
                time.sleep(_RETRY_S)
            continue
        try:
            answer = wire.receive(timeout_s=answer_s)
        except (OSError, Garbled) as error:
            raise UserError(f"{topology.describe_rank(0)} is gone: it ended before all had come") from error
        finally:
            wire.close()
        return {int(rank): str(text) for rank, text in answer["texts"].items()}, []
    return dict.fromkeys(range(1, topology.world_size), ""), failures.refused()


class _Failures:
    """What has become of the visits to each address: the kind of error, and since when it is the same."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._seen: dict[str, tuple[type[Exception], float]] = {}

    def note(self, error: Exception, address: str) -> None:
        """Note what became of one; raises UserError if further ones would be in vain."""
        now, kind = time.monotonic(), type(error)
        before, since_s = self._seen.get(address, (kind, now))
        self._seen[address] = kind, since_s if before is kind else now
        # At such an address is rank 0 or nobody; Slurm jobs may have addresses in common, and ours be at the next one.
        is_final = isinstance(self._topology.launcher, TFConfig) and now > self._seen[address][1] + _ENDING_S
        if kind is Started and is_final:
            raise UserError(
                f"rank {self._topology.rank} is taken: the job of {self._topology.describe_rank(0)} has already "
                "started with all its processes; wait until it ends, or give this process's job other addresses"
            ) from error
        if kind is Refused and is_final:
            raise UserError(
                f"{address}: a process of mnist_dist is there, with another secret than rank {self._topology.rank}: it "
                f"is another job's, or {SAME_FOR_ALL}"
            ) from error

    def refused(self) -> list[str]:
        """Where a process with another secret is."""
        return [address for address, (kind, _) in self._seen.items() if kind is Refused]


def knock(
    address: str, text: str, topology: Topology, *, key: bytes, topic: str, patience_s: float | None = None
) -> Wire:
    """Hand in the text at `address`, and wait `patience_s` seconds (15 by default) for an answer.

    Raises:
        RankTaken: another process has this one's rank.
        UserError: another job uses this address.
        OSError, ValueError, KeyError, TypeError: rank 0 is not there.
    """
    host, port = split_address(address)
    connection = socket.create_connection((meeting_point(host, topology), port), timeout=READ_TIMEOUT_S)
    try:
        try:
            wire = enter(connection, key, timeout_s=patience_s or _ANSWER_S, greeting_s=_GREETING_S)
        except Garbled as error:
            if error.start.startswith(b"\0"):  # the HTTP/2 greeting of TensorFlow's server
                raise Started from error
            raise
        job = job_id(topology)
        wire.send({"job": job, "topic": topic, "rank": topology.rank, "who": own_name(), "text": text})
        answer = wire.receive(timeout_s=patience_s or _ANSWER_S)
        if answer["job"] != job:
            if not isinstance(topology.launcher, TFConfig):  # Slurm jobs may have addresses in common
                raise ValueError("of another job")
            raise UserError(
                f"{address}: {answer['who']} is there, of another job with {answer['size']} processes, not the "
                f"{topology.world_size} that TF_CONFIG names here; give all processes of a job the same addresses, and "
                "each job its own"
            )
        if "taken" in answer:
            raise RankTaken(topology, str(answer["taken"]))
    except BaseException:
        connection.close()
        raise
    return wire


def describe_listener(address: str, topology: Topology, *, reason: str) -> str:
    """Why this process cannot listen at its address; raises RankTaken if a waiting process has its rank."""
    who, key = "another program has this port", meeting_key(topology, address)
    try:
        knock(address, "", topology, key=key, topic=FIRST_TOPIC, patience_s=_PATIENCE_S).close()
    except Started:
        return (
            f"rank {topology.rank} is taken: a running training has {address}; wait until it ends, or give "
            "this process's job other addresses, and each process its own index"
        )
    except RankTaken:
        raise
    except UserError:
        who = "a process of another job has this port"
    except Refused:
        who = "a process with another secret has this port"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return f"{address}: cannot listen there ({reason}): {who}; end it, or give rank {topology.rank} another port"
