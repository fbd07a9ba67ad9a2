"""Meeting through the key-value store that horovodrun serves to its processes."""

import json
import time
import urllib.request
from collections.abc import Collection
from typing import Any

from mnist_dist.base.errors import EnvironmentProblem, UserError
from mnist_dist.launch.reception import RankTaken, own_name
from mnist_dist.launch.topology import HorovodRun, Topology

_RETRY_S, _READ_TIMEOUT_S = 0.2, 5.0
# No proxies: the store is the launcher's own.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def exchange_over_store(
    text: str, launcher: HorovodRun, topology: Topology, *, topic: str, ranks: Collection[int], deadline: float
) -> dict[int, str]:
    """Hand in this rank's text; returns those of all `ranks` that have come by the deadline (`time.monotonic`).

    The store keeps what it has, so all ranks may meet again, but under another topic.

    Raises:
        RankTaken: another process has this one's rank.
        UserError: the store cannot be reached, or the ranks were started by different launchers.
    """
    base = f"http://{launcher.store}/mnist_dist.{topic}/"
    own = {"who": own_name(), "size": topology.world_size, "text": text}
    if before := _read(base, topology.rank):
        raise RankTaken(topology, str(before.get("who")))
    request = urllib.request.Request(base + str(topology.rank), data=json.dumps(own).encode(), method="PUT")
    try:
        _opener.open(request, timeout=_READ_TIMEOUT_S).close()
    except OSError as error:
        raise EnvironmentProblem(f"horovodrun's store at {launcher.store} cannot be reached ({error})") from error
    texts: dict[int, str] = {}
    while True:
        for rank in set(ranks) - set(texts):
            if time.monotonic() > deadline:
                return texts
            if (found := _read(base, rank)) is None:
                continue
            if rank == topology.rank and found != own:  # another process came at the same time
                raise RankTaken(topology, str(found.get("who")))
            if found.get("size") != topology.world_size:
                raise UserError(
                    f"rank {rank} has HOROVOD_SIZE={found.get('size')}, rank {topology.rank} has "
                    f"HOROVOD_SIZE={topology.world_size}; start all processes with one horovodrun"
                )
            texts[rank] = str(found.get("text"))
        if texts.keys() >= set(ranks):
            return texts
        time.sleep(_RETRY_S)


def _read(base: str, rank: int) -> dict[str, Any] | None:
    try:
        with _opener.open(base + str(rank), timeout=_READ_TIMEOUT_S) as answer:
            return dict(json.loads(answer.read()))
    except (OSError, ValueError, TypeError):
        return None  # not there yet
