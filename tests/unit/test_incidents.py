"""Incidents of a run, from its events alone."""

import json
from dataclasses import asdict, replace

import pytest

from mnist_dist.launch.losses import Loss
from mnist_dist.results.history import EpochMetrics, History
from mnist_dist.run.events import EVENTS, Event, EventLog, LostRank, read_events
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.incidents import Incident, list_incidents

HOSTS = ["a", "a", "b", "b"]


def history(num_epochs: int, *, first_s: float = 1.0, after: int = 0) -> History:
    """Epochs of a second each, but for the one after `after`."""
    seconds = [first_s if epoch == after + 1 else 1.0 for epoch in range(1, num_epochs + 1)]
    return History(tuple(EpochMetrics(i, 1.0, 0.5, 1.0, 0.5, 1e-3, s, 100.0) for i, s in enumerate(seconds, start=1)))


def started(time: float, epoch: int, *losses: Loss, hosts=HOSTS) -> Event:
    return Event(kind="started", time=time, epoch=epoch, facts={"hosts": hosts}, losses=losses)


def lost(time: float, epoch: int) -> Event:
    return Event(kind="lost", time=time, epoch=epoch)


def failed(time: float, epoch: int, **more) -> Event:
    return Event(kind="failed", time=time, epoch=epoch, reason="rank 2 (b) is gone", **more)


def silent(rank: int = 2, host: str = "b") -> dict:
    return {"error": "LostTouch", "lost": LostRank(rank, host, "silent for 30 s")}


def test_a_peer_is_lost():
    events = (started(100, 0), failed(150, 7, **silent()), started(170, 6), Event(kind="finished", time=200, epoch=20))
    expected = Incident(
        150, 7, ranks=(2,), hosts=("b",), how="silent for 30 s", epochs_computed_again=1, seconds_lost=21
    )
    assert list_incidents(events, history(20)) == (expected,)


def test_a_frozen_peer_costs_its_silence_too():
    """It was missed at 150, but the last epoch was finished at 120."""
    end = failed(150, 7, **silent(), last_epoch_time=120)
    (found,) = list_incidents((started(100, 0), end, started(170, 6)), history(20))
    assert (found.time, found.seconds_lost) == (150, 51)


def test_its_launcher_knows_more():
    """All ranks of the machine are lost, and another machine was when the launcher tried again."""
    losses = (Loss(160, ("b",), "rank 2 is gone (silent for 30 s)"), Loss(165, ("c",), "node c does not answer"))
    events = (started(100, 0), failed(150, 7, **silent()), started(170, 4, *losses, hosts=["a"]))
    (found,) = list_incidents(events, history(7))
    assert (found.ranks, found.hosts) == ((2, 3), ("b", "c"))
    assert found.how == "rank 2 is gone (silent for 30 s); node c does not answer"
    assert (found.time, found.epochs_computed_again, found.seconds_lost) == (150, 3, 23)


def test_without_a_word():
    events = (started(100, 0), lost(150, 7), started(170, 7))
    (found,) = list_incidents(events, history(20, first_s=3.5, after=7))
    assert (found.ranks, found.hosts, found.how) == ((0,), ("a",), "the run ended without a word")
    assert (found.epochs_computed_again, found.seconds_lost) == (0, 22.5)  # what the first epoch took longer


def test_without_a_word_but_the_launcher_has_one():
    """The chief may have been killed because of the others."""
    events = (started(100, 0), lost(150, 7), started(170, 7, Loss(155, (), "task 3: Killed")))
    (found,) = list_incidents(events, history(7))
    assert (found.ranks, found.hosts, found.how, found.time) == ((), (), "task 3: Killed", 150)
    assert found.seconds_lost == 20  # the next epoch is still being computed


def test_the_first_epoch_counts_once():
    events = (started(100, 0), lost(150, 7), started(170, 6))
    (found,) = list_incidents(events, history(20, first_s=3.5, after=6))
    assert found.seconds_lost == 23.5


def test_lost_again():
    """Before an epoch was finished, and before the run has come as far as it was."""
    events = (
        started(100, 0), lost(150, 7), started(170, 4), lost(180, 4), started(190, 4), failed(200, 5, **silent(1, "a")),
        started(210, 5),
    )  # fmt: skip
    found = list_incidents(events, history(10))
    assert [one.epochs_computed_again for one in found] == [3, 0, 0]
    assert [one.seconds_lost for one in found] == [23, 10, 10]
    assert [one.ranks for one in found] == [(0,), (0,), (1,)]


def test_starts_that_failed_after_a_stop():
    """The run itself was stopped on request; a later start lost a machine before it could note anything."""
    stop = Event(kind="stopped", time=150, epoch=7, last_epoch_time=149)
    assert list_incidents((started(100, 0), stop, started(170, 7)), history(7)) == ()
    (found,) = list_incidents((started(100, 0), stop, started(170, 7, Loss(160, ("b",), "no answer"))), history(7))
    assert (found.time, found.ranks, found.hosts, found.seconds_lost) == (160, (2, 3), ("b",), 10)


def test_lost_touch():
    """Nobody knows which process was lost."""
    events = (started(100, 0), failed(150, 7, error="LostTouch"), started(170, 7))
    (found,) = list_incidents(events, history(7))
    assert (found.ranks, found.hosts, found.how) == ((), (), "rank 2 (b) is gone")


@pytest.mark.parametrize(
    "events",
    [
        (),
        (started(100, 0),),
        (started(100, 0), lost(150, 7)),  # not started again
        (started(100, 0), failed(150, 7, error="Diverged"), started(170, 7)),
        (started(100, 0), Event(kind="finished", time=150, epoch=7), started(170, 7)),
        (started(100, 0), started(170, 7)),  # a line in between is damaged
        (started(100, 0, Loss(90, ("b",), "")), Event(kind="finished", time=150, epoch=7)),  # before the run began
    ],
)
def test_no_incident(events):
    assert list_incidents(events, history(7)) == ()


@pytest.mark.parametrize("hosts", [None, 5, [], [5]])
def test_strange_facts(hosts):
    events = (started(100, 0, hosts=hosts), lost(150, 7), started(50, 0, Loss(1, ("b",), "no answer")))
    (found,) = list_incidents(events, History())
    assert (found.hosts, found.seconds_lost, found.epochs_computed_again) == (("b",), 0, 7)


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    found = RunFolder(tmp_path / "run")
    found.reserve()
    return found


def test_each_loss_is_noted_once(folder):
    log = EventLog(folder)
    first, second, third = (Loss(float(n), ("b",), "no answer") for n in (1, 2, 3))
    for losses in ([first], [first, second, third], [first, second, third]):
        log.started(0, {}, losses)
    noted = [event.losses for event in read_events(folder.path) if event.kind == "started"]
    assert noted == [(first,), (second, third), ()]


def test_what_is_noted_is_read(folder):
    log = EventLog(folder)
    log.started(0, {"hosts": HOSTS})
    log.failed("rank 2 (b) is gone", "LostTouch", lost=LostRank(2, "b", "silent for 30 s"))
    log.started(0, {"hosts": ["a"]}, [Loss(5.0, ("b",), "no answer")])
    (found,) = log.incidents(History())
    assert (found.ranks, found.hosts, found.how) == ((2, 3), ("b",), "silent for 30 s; no answer")


def test_events_of_an_earlier_version(folder):
    old = [started(100.0, 0), lost(150.0, 7), started(170.0, 6)]
    lines = [
        {key: value for key, value in asdict(event).items() if key not in ("lost", "losses", "last_epoch_time")}
        for event in old
    ]
    (folder.path / EVENTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_events(folder.path) == tuple(old)
    (found,) = list_incidents(read_events(folder.path), history(7))
    assert found == replace(found, time=150.0, ranks=(0,), hosts=("a",), epochs_computed_again=1, seconds_lost=21.0)
