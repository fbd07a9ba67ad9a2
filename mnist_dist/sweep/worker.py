"""A worker: takes trials, trains each in a process of its own, and notes what has become of them.

Any number of workers share a folder, on any machines. Each decides by what the folder shows, under its lock: which
trials are alive is in their locks, which are done is in their run folders.
"""

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import replace

from mnist_dist.base.errors import EnvironmentFailed, TrainingFailed
from mnist_dist.cli.command_line import train_words
from mnist_dist.launch.child import Share, Signals, Stopped
from mnist_dist.results.history import History
from mnist_dist.run.checkpoint import CheckpointFolder
from mnist_dist.run.events import read_events
from mnist_dist.run.inspection import Inspection
from mnist_dist.run.sweep_folder import LOOK_S, Attempt, SweepFolder, Trial
from mnist_dist.sweep.outcome import end_attempt, end_reason, expect_stop, is_of_the_machine, judge
from mnist_dist.sweep.plan import Search
from mnist_dist.sweep.study import Study
from mnist_dist.sweep.training import Training

log = logging.getLogger("mnist_dist.sweep")

_REPORT_S, _WAIT_S = 0.5, 2.0
"""How often new epochs are looked for, and whether trials of others have died."""
_PATIENCE_S = 5.0
"""How long a worker that is to end waits for the folder's lock."""


class Worker:
    """Works until all trials of the plan are done, or there is a reason to end earlier."""

    def __init__(self, folder: SweepFolder, search: Search, shares: Sequence[Share], signals: Signals) -> None:
        """Train as many trials at once as there are `shares` of this machine."""
        self._folder, self._search, self._shares, self._signals = folder, search, shares, signals
        self._study = Study(folder.journal_path, search.plan, search.space, self._read_history)
        self._running: list[Training] = []
        self._end: Exception | None = None
        self._crashed: set[int] = set()
        """The trials that have crashed here since the last progress of any."""

    def run(self) -> None:
        """Work.

        Raises:
            Stopped: a signal has come.
            TrainingFailed: the trainings have failed for what seems to be the machine's fault.
        """
        try:
            while self._end is None and self._start_trials():
                self._wait()
            self._note_stop()
            while self._running:
                self._wait()
        finally:
            for training in self._running:  # an error has ended the loop
                training.stop()
        if self._end is not None:
            raise self._end

    def _start_trials(self) -> bool:
        """Start as many trials as there is room for; returns False once all are done."""
        while len(self._running) < len(self._shares):
            with self._folder.locked(wait=self._wait_for_lock):
                if self._end is not None:
                    return True
                claimed, is_over = self._claim_next()
            if claimed is None:
                return not is_over
            self._start(*claimed)
        return True

    def _wait(self) -> None:
        """Wait for something to happen, and see to it."""
        self._see_signals(_REPORT_S if self._running else _WAIT_S)
        for training in list(self._running):
            if training.process.poll() is not None:
                self._running.remove(training)
                self._conclude(training)
            elif self._search.plan.pruner != "none" and not training.was_asked_to_stop:
                self._report(training)  # otherwise, its epochs are reported at the end

    def _see_signals(self, timeout_s: float) -> None:
        """Wait so long, or until a training has ended; a signal ends this worker and goes to all trainings."""
        for number in self._signals.wait(timeout_s):
            self._stop(Stopped(number), number)

    def _stop(self, end: Exception, number: signal.Signals = signal.SIGTERM) -> None:
        self._end = self._end or end
        for training in self._running:
            training.stop(number)

    def _wait_for_lock(self, looks: int) -> None:
        self._see_signals(LOOK_S)
        if self._end is not None and looks * LOOK_S > _PATIENCE_S:
            raise self._end

    # Holding the folder's lock

    def _claim_next(self) -> tuple[tuple[Trial, int] | None, bool]:
        """A trial to train and the descriptor of its lock, if there is one now; and whether all trials are done."""
        trials = self._folder.read_records()
        num_alive = 0
        for number, trial in enumerate(trials):
            if trial.is_final and self._folder.as_it_is(self._search.plan, trial) == trial:
                continue
            claim = self._folder.claim(number)
            if claim is None:
                num_alive += 1
                continue
            trials[number] = self._settle(trials, trial)
            if not trials[number].is_final:
                return (self._begin(trials[number]), claim), False
            os.close(claim)
        if len(trials) < self._search.plan.num_trials:
            trial = self._study.ask(trials)
            self._folder.write_record(trial)
            claim = self._folder.claim(trial.number)
            if claim is not None:
                return (self._begin(trial), claim), False
        return None, num_alive == 0 and len(trials) >= self._search.plan.num_trials

    def _settle(self, trials: Sequence[Trial], trial: Trial) -> Trial:
        """Note what has become of a trial of which no training is alive; `trials` are the records as they are."""
        number, run_dir = trial.number, self._folder.run_dir(trial.number)
        recorded, epoch = trials[number], CheckpointFolder(run_dir / "checkpoints").newest_epoch()
        trial = end_attempt(trial, ended=self._last_sign(number), reached_epoch=epoch)
        if not recorded.is_final:
            trial = self._pruned(trial, self._study.report(trials, number))
        trial = judge(
            trial,
            value=self._folder.result(self._search.plan, trial),
            events=read_events(run_dir),
            epoch=epoch,
            max_attempts=self._search.plan.max_attempts,
        )
        if trial.is_final and not recorded.is_final:
            self._tell(trials, trial)
        if trial != recorded:
            self._folder.write_record(trial)
        return trial

    def _begin(self, trial: Trial) -> Trial:
        """Note the start of an attempt."""
        epoch = CheckpointFolder(self._folder.run_dir(trial.number) / "checkpoints").newest_epoch()
        attempt = Attempt(started=time.time(), host=socket.gethostname(), from_epoch=epoch)
        trial = replace(trial, state="running", reason="", attempts=(*trial.attempts, attempt))
        self._folder.write_record(trial)
        return trial

    def _pruned(self, trial: Trial, after_epoch: int | None) -> Trial:
        if after_epoch is None:
            return trial
        reason = f"behind the others after epoch {after_epoch} (pruner={self._search.plan.pruner})"
        return replace(trial, state="pruned", reason=reason, pruned_after_epoch=after_epoch)

    def _tell(self, trials: Sequence[Trial], trial: Trial) -> None:
        self._study.tell(trials, trial)
        if trial.state == "finished":
            log.info("Trial %d: validation accuracy %.4f", trial.number, trial.value)
        else:
            (log.warning if trial.state == "failed" else log.info)(
                "Trial %d: %s: %s", trial.number, trial.state, trial.reason
            )

    # The trainings

    def _start(self, trial: Trial, claim: int) -> None:
        number = trial.number
        slot = min(set(range(len(self._shares))) - {training.slot for training in self._running})
        epoch = trial.attempts[-1].from_epoch
        log.info("Trial %d: %s%s", number, " ".join(trial.overrides), f", from epoch {epoch}" if epoch else "")
        overrides = (*self._search.plan.overrides, *trial.overrides)
        words = train_words(self._folder.run_dir(number), overrides, config_dir=self._search.plan.config_dir)
        self._running.append(
            Training.start(
                words, self._folder.log_path(number), number=number, claim=claim, slot=slot, share=self._shares[slot]
            )
        )

    def _report(self, training: Training) -> None:
        """Tell Optuna what a training has reached, and stop it if it lags behind."""
        try:
            status = (self._folder.run_dir(training.number) / "history.csv").stat()
        except FileNotFoundError:
            return
        if (status.st_mtime_ns, status.st_size) == training.seen:
            return
        training.seen = (status.st_mtime_ns, status.st_size)
        with self._folder.locked(wait=self._wait_for_lock):
            trials = self._folder.read_records()
            trial = self._pruned(trials[training.number], self._study.report(trials, training.number))
            if trial.state == "pruned":
                self._tell(trials, trial)
                self._folder.write_record(trial)
                training.stop()

    def _note_stop(self) -> None:
        """Note that the trainings were asked to stop: this worker may be killed before they have ended."""
        if self._running:
            with self._folder.locked(wait=self._wait_for_lock):
                for training in self._running:
                    self._folder.write_record(expect_stop(self._folder.read_record(training.number)))

    def _conclude(self, training: Training) -> None:
        """Note how a training has ended, and what that makes of its trial."""
        number, code = training.number, training.process.returncode
        with self._folder.locked(wait=self._wait_for_lock):
            trials = self._folder.read_records()
            trial = end_attempt(
                trials[number],
                ended=time.time(),
                reached_epoch=CheckpointFolder(self._folder.run_dir(number) / "checkpoints").newest_epoch(),
                exit_code=code,
                reason=end_reason(
                    training.describe_end(),
                    exit_code=code,
                    was_asked_to_stop=training.was_asked_to_stop,
                    was_pruned=trials[number].state == "pruned",
                ),
            )
            trial = self._settle(trials, trial)
            os.close(training.claim)
        if not training.was_asked_to_stop:
            self._judge_machine(trial)

    def _judge_machine(self, trial: Trial) -> None:
        """Stop if what has ended the last attempt would end those of other trials too, until none is left."""
        last = trial.attempts[-1]
        if trial.state == "finished" or (last.reached_epoch or 0) > last.from_epoch:
            self._crashed.clear()
        elif not trial.is_final:
            self._crashed.add(trial.number)
        if trial.is_final:
            return
        log.warning("Trial %d: %s; it is tried again", trial.number, trial.reason)
        if is_of_the_machine(last):
            self._stop(TrainingFailed(f"trial {trial.number}: {last.reason}"))
        elif len(self._crashed) >= self._search.plan.max_attempts:
            self._stop(
                EnvironmentFailed(
                    f"{len(self._crashed)} trials in a row have crashed on this machine without a new checkpoint; "
                    f"trial {trial.number}: {last.reason}"
                )
            )

    def _last_sign(self, number: int) -> float:
        """When a training that nobody has watched to its end still did something, seconds since 1970."""
        times = [0.0]
        for path in (self._folder.log_path(number), self._folder.run_dir(number) / "history.csv"):
            with contextlib.suppress(FileNotFoundError):
                times.append(path.stat().st_mtime)
        return max(times)

    def _read_history(self, trial: Trial) -> History:
        found = Inspection(self._folder.run_dir(trial.number))
        return found.read_history(None) or History()
