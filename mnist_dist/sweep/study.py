"""Optuna: which values to try next, and whether a trial lags behind.

The journal is made from the sweep's folder, so that Optuna and its tools can read it; where it says something else
than the records it is made again. All methods are for those who hold the folder's lock.
"""

import contextlib
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from mnist_dist.config.search_space import Choice, Dimension, Interval, Range
from mnist_dist.results.history import History
from mnist_dist.run.sweep_folder import SweepPlan, Trial

STUDY_NAME = "mnist_dist"

_STATES = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
# A trial is left alone until so many others are finished, and for this share of its epochs: the first ones say little.
_MIN_TRIALS, _WARMUP = 5, 0.1
_BEST_PERCENT = 25.0


class _HeldAlready(JournalFileOpenLock):
    """No lock: whoever uses the journal holds that of the folder, which cannot outlive its process."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


class Study:
    """The study of a sweep."""

    def __init__(
        self,
        path: Path,
        plan: SweepPlan,
        space: Mapping[str, Dimension],
        read_history: Callable[[Trial], History],
    ) -> None:
        """Keep the journal at `path`, which need not exist; `read_history` reads the epochs of a trial."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._path, self._plan, self._space, self._read_history = path, plan, space, read_history
        self._distributions = {key: _distribution(dimension) for key, dimension in space.items()}
        self._opened: optuna.Study | None = None
        self._first_line, self._size = b"", 0

    def ask(self, trials: Sequence[Trial]) -> Trial:
        """The next trial; it depends on these, on the plan and on nothing else."""
        number = len(trials)
        with self._up_to_date(trials) as study:
            if self._plan.sampler == "grid":
                grid = itertools.product(*map(_texts, self._space.values()))
                trial = self._trial(number, next(itertools.islice(grid, number, None)))
                study.add_trial(self._frozen(trial))
                return trial
            study.sampler = self._sampler(number)
            asked = study.ask(self._distributions)
            return self._trial(number, [_text(self._space[key], asked.params[key]) for key in self._space])

    def report(self, trials: Sequence[Trial], number: int) -> int | None:
        """Report the new epochs of a trial, one by one; returns that after which it is to be pruned, or None."""
        with self._up_to_date(trials) as study:
            frozen = study.get_trials(deepcopy=False)[number]
            trial = optuna.Trial(study, frozen._trial_id)
            for row in self._read_history(trials[number]).epochs[len(frozen.intermediate_values) :]:
                trial.report(row.val_accuracy, row.epoch)
                if trial.should_prune():
                    return row.epoch
        return None

    def tell(self, trials: Sequence[Trial], ended: Trial) -> None:
        """Note what has become of a trial that is still under way in `trials`."""
        with self._up_to_date(trials) as study:
            study.tell(ended.number, ended.value, state=_STATES[ended.state])

    # The journal

    @contextlib.contextmanager
    def _up_to_date(self, trials: Sequence[Trial]) -> Iterator[optuna.Study]:
        """The study, with these trials, for a block that adds to it."""
        try:
            study = self._open()
            is_right = self._agrees(study.get_trials(deepcopy=False), trials)
        except Exception:  # whatever may be in a damaged file
            is_right = False
        if not is_right:
            self._opened = None
            self._write_again(trials)
            study = self._open()
        yield study
        self._size = self._path.stat().st_size

    def _open(self) -> optuna.Study:
        """The study in the file as it is now; raises all kinds of errors if it is damaged."""
        with self._path.open("rb") as stream:
            first_line = stream.readline()  # no other journal has the same
            size = stream.seek(-1, os.SEEK_END)
            if stream.read() != b"\n":
                raise ValueError("its last line is torn")
        # What was read once is not read again; others only add to it.
        if self._opened is None or first_line != self._first_line or size < self._size - 1:
            self._opened = optuna.load_study(study_name=STUDY_NAME, storage=_storage(self._path), pruner=self._pruner())
            self._first_line = first_line
        return self._opened

    def _agrees(self, found: Sequence[FrozenTrial], trials: Sequence[Trial]) -> bool:
        return len(found) == len(trials) and all(
            one.state == _STATES.get(trial.state, TrialState.RUNNING)
            and (trial.state != "finished" or one.value == trial.value)
            and one.params == self._params(trial)
            for one, trial in zip(found, trials, strict=True)
        )

    def _write_again(self, trials: Sequence[Trial]) -> None:
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        temporary.unlink(missing_ok=True)
        study = optuna.create_study(study_name=STUDY_NAME, storage=_storage(temporary), direction="maximize")
        study.add_trials(self._frozen(trial) for trial in trials)
        temporary.replace(self._path)

    def _frozen(self, trial: Trial) -> FrozenTrial:
        """A trial as Optuna has it; the epochs of one that is under way are yet to be reported."""
        rows = self._read_history(trial).epochs[: trial.pruned_after_epoch] if trial.is_final else ()
        values = {row.epoch: row.val_accuracy for row in rows}
        frozen = optuna.create_trial(
            state=_STATES.get(trial.state, TrialState.RUNNING),
            value=values[max(values)] if trial.state == "pruned" and values else trial.value,
            params=self._params(trial),
            distributions=self._distributions,
            intermediate_values=values,
        )
        if trial.attempts:
            frozen.datetime_start = datetime.fromtimestamp(trial.attempts[0].started)
        if trial.is_final and trial.attempts:
            frozen.datetime_complete = datetime.fromtimestamp(trial.attempts[-1].ended or trial.attempts[-1].started)
        return frozen

    # Values

    def _trial(self, number: int, texts: Sequence[str]) -> Trial:
        found = dict(zip(self._space, texts, strict=True))
        params = {key: _value(self._space[key], text) for key, text in found.items()}
        return Trial(number, params, tuple(f"{key}={text}" for key, text in found.items()))

    def _params(self, trial: Trial) -> dict[str, Any]:
        """A trial's values as Optuna has them."""
        return {key: _param(dimension, trial.texts[key], trial.params[key]) for key, dimension in self._space.items()}

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """A new one for each trial, so that it depends on the trial's number only, and not on who asked before."""
        seed = int(np.random.SeedSequence([self._plan.seed, number]).generate_state(1)[0])
        if self._plan.sampler == "random":
            return optuna.samplers.RandomSampler(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna calls these two experimental
            # constant_liar: trials that are under way count as bad, so that several workers try different values.
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)

    def _pruner(self) -> optuna.pruners.BasePruner:
        epochs = int(self._plan.training.get("trainer.epochs", 0))
        options = {"n_startup_trials": _MIN_TRIALS, "n_warmup_steps": int(_WARMUP * epochs)}
        if self._plan.pruner == "median":
            return optuna.pruners.MedianPruner(**options)
        if self._plan.pruner == "percentile":
            return optuna.pruners.PercentilePruner(_BEST_PERCENT, **options)
        return optuna.pruners.NopPruner()


def _storage(path: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(path), lock_obj=_HeldAlready(str(path))))


def _distribution(dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, Choice):
        return CategoricalDistribution(dimension.texts)
    if isinstance(dimension, Interval):
        if dimension.is_int:
            return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.is_log)
        return FloatDistribution(dimension.low, dimension.high, log=dimension.is_log)
    if _has_positions(dimension):
        return IntDistribution(0, len(dimension.values) - 1)
    low, high = int(dimension.values[0]), int(dimension.values[-1])
    return IntDistribution(low, high, step=(high - low) // (len(dimension.values) - 1 or 1) or 1)


def _has_positions(dimension: Range) -> bool:
    """Whether Optuna gets positions in place of the values: it adds up steps, which gives fractions other last bits."""
    return not all(isinstance(value, int) for value in dimension.values)


def _texts(dimension: Dimension) -> tuple[str, ...]:
    assert not isinstance(dimension, Interval)  # `plan.grid_size`
    return dimension.texts


def _text(dimension: Dimension, value: Any) -> str:
    """What Optuna has chosen, as the command line has it."""
    if isinstance(dimension, Choice):
        return str(value)
    if isinstance(dimension, Range):
        return dimension.texts[value] if _has_positions(dimension) else repr(int(value))
    return repr(int(value) if dimension.is_int else float(value))


def _param(dimension: Dimension, text: str, value: Any) -> Any:
    """The opposite of `_text`."""
    if isinstance(dimension, Choice):
        return text
    return dimension.values.index(value) if isinstance(dimension, Range) and _has_positions(dimension) else value


def _value(dimension: Dimension, text: str) -> Any:
    return dimension.values[dimension.texts.index(text)] if isinstance(dimension, Choice) else json.loads(text)
