"""How a rank reaches rank 0, or any process that listens at an address of the job: it knocks until one answers."""

import itertools
import socket
import time
from collections.abc import Sequence

from mnist_dist.base.errors import UserError
from mnist_dist.base.wire import Garbled, Wire
from mnist_dist.launch.address import split_address
from mnist_dist.launch.reception import FIRST_TOPIC, READ_TIMEOUT_S, RankTaken, job_id, own_name
from mnist_dist.launch.topology import TFConfig, Topology

_RETRY_S = 0.2
_ANSWER_S = 15.0
_ENDING_S = 3.0  # the server of a job that ends may still answer for this long
_PATIENCE_S = 3.0


class Started(ValueError):
    """TensorFlow's server answers, instead of a process that waits for others."""


def visit(
    text: str, addresses: Sequence[str], topology: Topology, *, topic: str, deadline: float, answer_s: float
) -> dict[int, str]:
    """Knock at rank 0's addresses until it answers, then wait for the texts of all ranks.

    Args:
        text: what this rank hands in.
        addresses: where rank 0 may be.
        topology: that of this process.
        topic: what the texts are about.
        deadline: until when to knock, on the clock of `time.monotonic`.
        answer_s: seconds that rank 0 may wait for the other ranks once it has answered.

    Returns:
        The texts of all ranks; if rank 0 has not answered by the deadline, empty texts of all ranks but 0.

    Raises:
        RankTaken: another process has this one's rank.
        UserError: the job has started without this process, or rank 0 has ended.
    """
    started_s = None
    for address in itertools.cycle(addresses):
        try:
            wire = knock(address, text, topology, topic=topic)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, Started) and isinstance(topology.launcher, TFConfig):
                started_s = started_s or time.monotonic()
                if time.monotonic() > started_s + _ENDING_S:
                    raise UserError(
                        f"rank {topology.rank} is taken: the job of {topology.describe_rank(0)} has already started "
                        "with all its processes; wait until it ends, or give this process's job other addresses"
                    ) from error
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
        return {int(rank): str(text) for rank, text in answer["texts"].items()}
    return dict.fromkeys(range(1, topology.world_size), "")


def knock(address: str, text: str, topology: Topology, *, topic: str, patience_s: float | None = None) -> Wire:
    """Hand in the text at `address`, and wait `patience_s` seconds (15 by default) for an answer.

    Raises:
        RankTaken: another process has this one's rank.
        UserError: another job uses this address.
        OSError, ValueError, KeyError, TypeError: rank 0 is not there.
    """
    wire = Wire(socket.create_connection(split_address(address), timeout=READ_TIMEOUT_S))
    try:
        job = job_id(topology)
        wire.send({"job": job, "topic": topic, "rank": topology.rank, "who": own_name(), "text": text})
        try:
            # The process there may belong to another job, or not be ours at all.
            answer = wire.receive(timeout_s=patience_s or _ANSWER_S)
        except Garbled as error:
            if error.start.startswith(b"\0"):  # the HTTP/2 greeting of TensorFlow's server
                raise Started from error
            raise
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
        wire.close()
        raise
    return wire


def describe_listener(address: str, topology: Topology, *, reason: str) -> str:
    """Why this process cannot listen at its address; raises RankTaken if a waiting process has its rank."""
    who = "another program has this port"
    try:
        knock(address, "", topology, topic=FIRST_TOPIC, patience_s=_PATIENCE_S).close()
    except Started:
        return (
            f"rank {topology.rank} is taken: a running training has {address}; wait until it ends, or give "
            "this process's job other addresses, and each process its own index"
        )
    except RankTaken:
        raise
    except UserError:
        who = "a process of another job has this port"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return f"{address}: cannot listen there ({reason}): {who}; end it, or give rank {topology.rank} another port"
