"""From the files of `conf/` and a command line to typed configuration objects, by Hydra."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import hydra
from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mnist_dist.base.errors import UserError
from mnist_dist.config.augment import AffineConfig, AugmentConfig, ShiftConfig
from mnist_dist.config.compare import IMPLIED
from mnist_dist.config.model import CNNConfig, KerasConfig, MLPConfig
from mnist_dist.config.optimization import AdamConfig, AdamWConfig, SGDConfig
from mnist_dist.config.rules import shorten
from mnist_dist.config.train import TrainConfig

Config = TypeVar("Config")

# Choices that have their own keys, by the name below `schema/` under which the files of `conf/` refer to them.
_CHOICES: dict[tuple[str, str], type] = {
    ("model", "mlp"): MLPConfig,
    ("model", "cnn"): CNNConfig,
    ("model", "keras"): KerasConfig,
    ("optimizer", "adam"): AdamConfig,
    ("optimizer", "adamw"): AdamWConfig,
    ("optimizer", "sgd"): SGDConfig,
    ("augment", "none"): AugmentConfig,
    ("augment", "shift"): ShiftConfig,
    ("augment", "affine"): AffineConfig,
}


@dataclass(frozen=True)
class Command(Generic[Config]):
    """A command, as far as the configuration is concerned."""

    name: str
    """`python -m mnist_dist.<name>`, and `conf/<name>.yaml`."""
    schema: type[Config]
    """The dataclass with its keys; `schema/<name>` in the files of `conf/`."""


TRAIN = Command("train", TrainConfig)


def compose(
    command: Command[Any], overrides: Sequence[str], *, config_dir: str | None = None, config_name: str | None = None
) -> DictConfig:
    """Compose the files of `conf/` and a command line, checked against the schema of `command` except for ranges.

    Hydra only composes: settings of Hydra itself in a user's file have no effect.

    Args:
        command: which command is configured.
        overrides: texts KEY=VALUE.
        config_dir: a folder with the user's own files.
        config_name: the file in it to start from; by default that of `command` in `conf/`.

    Raises:
        UserError: a file cannot be read, or does not configure `command`.
        hydra.errors.HydraException, omegaconf.errors.OmegaConfBaseException: an unknown key, choice or type.
    """
    _register_schemas(command)
    version.setbase("1.3")
    GlobalHydra.instance().clear()  # Hydra composes one command line at a time
    search_path = create_config_search_path(str(conf_dir()))
    if config_dir is not None:  # before the schemas
        place = SearchPathQuery(provider="schema")
        search_path.prepend("command-line", f"file://{Path(config_dir).absolute()}", anchor=place)
    other = UserError(
        f"--config-name={config_name}: does not configure {command.name}; start the file with defaults: "
        f"[{command.name}, _self_]"
    )
    try:
        Hydra.create_main_hydra2(command.name, search_path)
        # The override disables files that name further folders or packages to search.
        composed = hydra.compose(config_name or command.name, [*overrides, "hydra.searchpath=[]"])
    except (HydraException, OmegaConfBaseException) as error:
        if isinstance(error, MissingConfigException) and str(error.missing_cfg_file).startswith("schema/"):
            raise other from error
        if config_name is not None and overrides:  # report an error in the file itself first
            compose(command, (), config_dir=config_dir, config_name=config_name)
        raise
    except RecursionError as error:
        raise UserError(
            "the configuration cannot be read: the defaults of its files form a cycle, or are nested too deep"
        ) from error
    except Exception as error:  # YAML, decoding, files, defaults: each raises its own errors
        raise UserError(f"the configuration cannot be read: {shorten(' '.join(str(error).split()), 400)}") from error
    if OmegaConf.get_type(composed) is not command.schema:
        raise other
    if config_name is not None and issubclass(command.schema, TRAIN.schema):
        _fill_in(composed)
    return composed


def _fill_in(composed: DictConfig) -> None:
    """Give the keys that the file of an earlier version does not have what that version did."""
    for key, text in {**IMPLIED, "report": "true", "tensorboard": "false"}.items():
        parent, _, name = key.rpartition(".")
        if parent and OmegaConf.is_missing(composed, parent):
            OmegaConf.update(composed, parent, {name: text})
        elif OmegaConf.is_missing(OmegaConf.select(composed, parent) if parent else composed, name):
            OmegaConf.update(composed, key, None if text == "None" else text)


def choices_with(key: str) -> list[str]:
    """Which choices have a key, as GROUP=CHOICE."""
    group, _, name = key.partition(".")
    return [
        f"{group}={choice}"
        for (own_group, choice), schema in _CHOICES.items()
        if own_group == group and name in {one.name for one in fields(schema)}
    ]


def compose_config(*overrides: str) -> TrainConfig:
    """The configuration of `train` for this command line; raises as `compose` and `to_config` do."""
    return to_config(TRAIN, compose(TRAIN, overrides))


def to_config(command: Command[Config], composed: DictConfig) -> Config:
    """The typed configuration of a composed one; raises UserError for values out of range."""
    config = OmegaConf.to_object(composed)
    assert isinstance(config, command.schema)
    return config


def conf_dir() -> Path:
    """The folder `conf/`: inside the package once installed, next to it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    return next(folder for folder in (package / "conf", package.parent / "conf") if folder.is_dir())


def _register_schemas(command: Command[Any]) -> None:
    store = ConfigStore.instance()
    store.store(group="schema", name=command.name, node=command.schema)
    if issubclass(command.schema, TRAIN.schema):  # its file starts from that of `train`, and adds keys
        store.store(group="schema", name=TRAIN.name, node=command.schema)
    for (group, name), node in _CHOICES.items():
        store.store(group=f"schema/{group}", name=name, node=node)
