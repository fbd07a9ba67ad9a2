"""From the command line to the plan of a sweep, with every value checked before the first trial starts."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from mnist_dist.base.errors import UserError
from mnist_dist.cli.command_line import CommandLine, check_override, groups_of, parse_override
from mnist_dist.cli.explain import explain
from mnist_dist.config.compare import IMPLIED, sweep_keys
from mnist_dist.config.compose import TRAIN, compose, conf_dir, to_config
from mnist_dist.config.rules import shorten
from mnist_dist.config.search_space import Dimension, Interval, parse_space, read_space
from mnist_dist.data.load import load_dataset
from mnist_dist.run.checkpoint import DATA_DIGEST
from mnist_dist.run.sweep_folder import SweepPlan
from mnist_dist.sweep.config import OWN_KEYS, SweepConfig

# Keys that a sweep sets itself, or that do not change a training.
_NOT_FOR_SPACES = ("run_dir", "resume", "checkpoint", "plots", "report", "tensorboard", "console", "threads")
_REFUSALS = (UserError, HydraException, OmegaConfBaseException)


@dataclass(frozen=True)
class Search:
    """A plan, and what its search space means."""

    plan: SweepPlan
    space: Mapping[str, Dimension]


def build_search(config: SweepConfig, typed: CommandLine) -> Search:
    """What this command line searches; raises UserError, naming the key, for whatever could not be trained."""
    if config.run_dir is not None:
        raise UserError(f"run_dir={config.run_dir}: each trial has its own below sweep_dir; give sweep_dir=FOLDER")
    if config.resume != "auto":
        raise UserError(f"resume={config.resume}: a sweep continues its trials; leave it out")
    if typed.config_name is not None:
        raise UserError(f"--config-name={typed.config_name}: not for sweeps; give the keys, or experiment=NAME")
    texts = read_space(config.space)
    try:
        space = parse_space(texts)
        overrides = _of_training(typed.overrides, space)
        training = _Checker(space, texts, overrides, typed.config_dir).check()
    except UserError as error:
        raise UserError(f"space={shorten(config.space)}: {error}") from error
    num_trials = config.num_trials
    if config.sampler == "grid":
        num_trials = min(num_trials, grid_size(space))
    if not any(key == "data" or key.startswith("data.") for key in space):
        # `data=auto` may find other data on another machine; and without data no trial need start.
        training[DATA_DIGEST] = load_dataset(config.data).sha256
    plan = SweepPlan(
        space=texts,
        sampler=config.sampler,
        pruner=config.pruner,
        seed=config.seed,
        num_trials=num_trials,
        max_attempts=config.max_attempts,
        training=training,
        overrides=overrides,
        config_dir=typed.config_dir,
    )
    return Search(plan, space)


def grid_size(space: Mapping[str, Dimension]) -> int:
    """How many combinations a grid has; raises UserError if it has no end."""
    size = 1
    for key, dimension in space.items():
        if isinstance(dimension, Interval):
            raise UserError(f"sampler=grid: {key} is an interval; give it single values, or take sampler=random")
        size *= len(dimension.values)
    return size


def check_same(found: SweepPlan, asked: SweepPlan, *, path: object) -> None:
    """Raise UserError, naming the first key that differs, unless both plans are of one sweep."""
    for name in ("space", "sampler", "pruner", "seed", "training"):
        theirs, ours = getattr(found, name), getattr(asked, name)
        if not isinstance(theirs, Mapping):
            theirs, ours = {name: str(theirs)}, {name: str(ours)}
        if name == "training":  # the sweep may be of an earlier version
            theirs = {key: value for key, value in IMPLIED.items() if key in ours} | theirs
        for key in sorted({*theirs, *ours}):
            was, now = theirs.get(key, "not given"), ours.get(key, "not given")
            if was != now:
                raise UserError(
                    f"sweep_dir={path}: holds another sweep ({'space: ' * (name == 'space')}{key} was {was}, is now "
                    f"{now}); name another sweep_dir, or use its values"
                )


def _of_training(overrides: Sequence[str], space: Mapping[str, Dimension]) -> tuple[str, ...]:
    """The user's overrides without the sweep's own keys; raises UserError for keys that vary."""
    kept = []
    for text in overrides:
        key = parse_override(text).key_or_group
        if key in space:
            raise UserError(f"{shorten(text)}: the search space varies this key; leave it out")
        if key not in OWN_KEYS:
            kept.append(text)
    return tuple(kept)


class _Checker:
    """Composes the configuration of `train` with the values of a search space."""

    def __init__(
        self, space: Mapping[str, Dimension], texts: Mapping[str, str], overrides: Sequence[str], config_dir: str | None
    ) -> None:
        self._space, self._texts, self._overrides, self._config_dir = space, texts, overrides, config_dir
        groups = groups_of(conf_dir() / f"{TRAIN.name}.yaml")
        self._groups = [key for key in space if key in groups]

    def check(self) -> dict[str, str]:
        """Raise UserError for a value that no trial could have; returns what all trainings have in common."""
        for key in self._space:
            self._check_values(key)
        composed = []
        for choices in self._combinations():
            with contextlib.suppress(*_REFUSALS):  # a bad combination of good choices
                composed.append(self._compose(choices).items())
        common = set(composed[0]).intersection(*composed[1:])
        return {key: value for key, value in sorted(common) if key not in self._space}

    def _check_values(self, key: str) -> None:
        """Raise UserError unless each value goes with some choice of the others, as far as these are tried.

        What does not go together otherwise is for the trials to find out.
        """
        if key.split(".")[0] in _NOT_FOR_SPACES:
            raise UserError(f"{key}: cannot vary, as it does not change the training")
        for text in self._space[key].edges:
            refusals: list[str] = []
            for others in self._others(key):
                if others.get(key, text) != text:
                    continue
                try:
                    self._compose({**others, key: text})
                    break
                except UserError as error:
                    refusals.append(str(error))
                except (HydraException, OmegaConfBaseException) as error:
                    refusals.append(explain(error))
            else:
                raise UserError(f"{key}: {self._texts[key]}: {refusals[0]}{self._hint(key, refusals[0])}")

    def _others(self, key: str) -> Iterator[dict[str, str]]:
        """Every combination of the groups' choices, then each of these with every value of one other key."""
        yield from self._combinations()
        for other in self._space.keys() - {key, *self._groups}:
            for text in self._space[other].edges:
                for choices in self._combinations():
                    yield {**choices, other: text}

    def _hint(self, key: str, refusal: str) -> str:
        dimension = self._space[key]
        if isinstance(dimension, Interval) and not dimension.is_int and "whole number" in refusal:
            return f"; write int(interval({dimension.low:g},{dimension.high:g}))"
        return ""

    def _combinations(self) -> Iterator[dict[str, str]]:
        """Every combination of the groups' choices."""
        for texts in itertools.product(*(self._space[key].edges for key in self._groups)):
            yield dict(zip(self._groups, texts, strict=True))

    def _compose(self, values: Mapping[str, str]) -> dict[str, str]:
        """What the result of the training with these values depends on; raises `_REFUSALS`."""
        texts = [f"{key}={text}" for key, text in values.items()]
        for text in texts:
            check_override(text)
        composed = compose(TRAIN, [*self._overrides, *texts], config_dir=self._config_dir)
        return sweep_keys(asdict(to_config(TRAIN, composed)))
