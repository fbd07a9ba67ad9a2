"""Incidents of a run: what was lost while it trained, and what that has cost."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mnist_dist.base.errors import LostTouch
from mnist_dist.results.history import History

if TYPE_CHECKING:
    from mnist_dist.run.events import Event

_WITHOUT_A_WORD = "the run ended without a word"


@dataclass(frozen=True)
class Incident:
    """Processes were lost, and the run was started again: once in one place, however often it was tried."""

    time: float
    """When it was noticed, seconds since 1970; of a run that ended without a word, when it last wrote its history."""
    epoch: int
    """Finished epochs at that time."""
    ranks: tuple[int, ...]
    """Those that are known to have been lost, as they were numbered then."""
    hosts: tuple[str, ...]
    """Where they ran, and machines that were lost at a later try."""
    how: str
    """How it was noticed, in words."""
    epochs_computed_again: int
    seconds_lost: float
    """From its last epoch until the run was as far again."""


def list_incidents(events: Sequence["Event"], history: History) -> tuple[Incident, ...]:
    """The incidents of a run: each time that processes were lost and it was started again.

    The seconds lost are those from the end of the last epoch to the next start, whatever passed in between (an epoch
    that was not finished, the silence of a frozen process, the queue), and of the epochs computed again; where there
    are none, what the first epoch took longer than the median one.
    """
    starts = [number for number, event in enumerate(events) if event.kind == "started"]
    return tuple(
        _describe(events[first], events[second - 1], events[second], history)
        for first, second in itertools.pairwise(starts)
        if _was_lost(events[second - 1]) or events[second].losses
    )


def _was_lost(end: "Event") -> bool:
    return end.kind == "lost" or (end.kind == "failed" and (end.lost is not None or end.error == LostTouch.__name__))


def _describe(before: "Event", end: "Event", start: "Event", history: History) -> Incident:
    was_lost = _was_lost(end)
    moment = end.time if was_lost else start.losses[0].time
    since = (end.last_epoch_time or moment) if was_lost else moment
    seconds = [row.epoch_s for row in history.epochs]
    again = max(end.epoch - start.epoch, 0)
    behind_s = sum(seconds[start.epoch : end.epoch])
    if not again and start.epoch < len(seconds):
        behind_s = max(seconds[start.epoch] - statistics.median(seconds), 0.0)
    hosts = {host: None for loss in start.losses for host in loss.hosts}
    ranks = {rank for rank, host in enumerate(before.hosts) if host in hosts}
    how = [loss.how for loss in start.losses]
    if end.lost is not None:
        ranks.add(end.lost.rank)
        hosts = {end.lost.host: None, **hosts}
        how = [*([] if any(end.lost.how in words for words in how) else [end.lost.how]), *how]
    elif was_lost and not start.losses:
        # Rank 0 would have noted anything else.
        ranks, hosts = ({0}, dict.fromkeys(before.hosts[:1])) if end.kind == "lost" else (set(), {})
        how = [end.reason or _WITHOUT_A_WORD]
    return Incident(
        time=moment,
        epoch=end.epoch,
        ranks=tuple(sorted(ranks)),
        hosts=tuple(hosts),
        how="; ".join(dict.fromkeys(how)),
        epochs_computed_again=again,
        seconds_lost=max(start.time - since, 0.0) + behind_s,
    )
