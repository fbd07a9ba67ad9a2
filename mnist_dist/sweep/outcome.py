"""What becomes of a trial whose training has ended: plain values in, plain values out."""

from collections.abc import Sequence
from dataclasses import replace

from mnist_dist.base.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, Diverged
from mnist_dist.cli.main import DOCTOR_HINT
from mnist_dist.run.events import Event
from mnist_dist.run.sweep_folder import Attempt, Trial

STOPPED = "stopped together with the sweep"
"""The reason of attempts that do not count, as the sweep itself has ended them."""
LOST = "the sweep was killed, or its machine was lost"


def expect_stop(trial: Trial) -> Trial:
    """The trial with a note in its last attempt that it was asked to stop, in case nobody lives to see its end."""
    return replace(trial, attempts=(*trial.attempts[:-1], replace(trial.attempts[-1], reason=STOPPED)))


def end_attempt(
    trial: Trial, *, ended: float, reached_epoch: int, exit_code: int | None = None, reason: str | None = None
) -> Trial:
    """The trial with the end of its last attempt noted, unless that has been done; without a reason it is lost."""
    if not trial.attempts or trial.attempts[-1].ended is not None:
        return trial
    last = trial.attempts[-1]
    reason = (last.reason or LOST) if reason is None else reason
    end = replace(last, ended=ended, reached_epoch=reached_epoch, exit_code=exit_code, reason=reason)
    return replace(trial, attempts=(*trial.attempts[:-1], end))


def judge(trial: Trial, *, value: float | None, events: Sequence[Event], epoch: int, max_attempts: int) -> Trial:
    """The trial with the state that follows from what is known once no training of it is alive.

    Args:
        trial: with the ends of its attempts.
        value: its result, if its run folder has one.
        events: those of its run folder.
        epoch: that of its newest checkpoint, 0 for none.
        max_attempts: how often it is tried from the same checkpoint.
    """
    if trial.state == "pruned":
        return trial
    if value is not None:
        return replace(trial, state="finished", value=value, reason="")
    last = trial.attempts[-1] if trial.attempts else None
    if events and events[-1].kind == "failed" and events[-1].error == Diverged.__name__:
        return _failed(trial, events[-1].reason)  # the same bits would come again
    if last and epoch == 0 and last.exit_code == EXIT_USER_ERROR and not _may_pass(last):
        return _failed(trial, last.reason)  # a bad combination of values
    if last and _num_tries(trial.attempts, epoch) >= max_attempts:
        return _failed(trial, f"{last.reason} (tried {max_attempts} times from epoch {epoch})")
    return replace(trial, state="waiting", value=None, reason=last.reason if last else "")


def end_reason(described: str, *, exit_code: int, was_asked_to_stop: bool, was_pruned: bool) -> str:
    """Why an attempt has ended, in words."""
    if was_pruned:
        return "stopped as the trial was pruned"
    if was_asked_to_stop and exit_code != EXIT_USER_ERROR and exit_code != 0:
        return STOPPED
    return "stopped on request of somebody else" if exit_code == EXIT_PREEMPTED else described


def _failed(trial: Trial, reason: str) -> Trial:
    return replace(trial, state="failed", value=None, reason=reason)


def _may_pass(attempt: Attempt) -> bool:
    """Whether it was refused for something else than its values: its folder is in use, its machine lacks the data."""
    return attempt.reason.startswith(("run_dir=", "data")) or is_of_the_machine(attempt)


def is_of_the_machine(attempt: Attempt) -> bool:
    """Whether the training itself has said that its machine is at fault, and not the trial."""
    return attempt.reason.endswith(DOCTOR_HINT)


def _num_tries(attempts: Sequence[Attempt], epoch: int) -> int:
    """How many attempts have begun at the newest checkpoint, and failed."""
    return sum(one.from_epoch == epoch and one.reason != STOPPED and not is_of_the_machine(one) for one in attempts)
