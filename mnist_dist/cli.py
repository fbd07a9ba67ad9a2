"""From the command line to a typed configuration, and from errors to exit codes.

Hydra composes the configuration; this module turns what Hydra, the checks and the run can raise into the one line and
the exit code that scripts rely on (`errors.py`).
"""

import difflib
import os
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn

import hydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from mnist_dist.config import conf_dir, register_schemas, to_config
from mnist_dist.console import Console
from mnist_dist.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, EXIT_USER_ERROR, TrainingFailed, UserError


def run(entry: Callable[[Any, Console], int], *, config_name: str) -> NoReturn:
    """Compose the configuration `config_name` of conf/ with the command line, call `entry` with it, and exit."""
    exit_codes: list[int] = []

    def task(composed: DictConfig) -> None:
        # Errors end here, before Hydra can add its own words to them.
        exit_codes.append(_guarded(lambda: _call(entry, composed)))

    register_schemas()
    # Hydra would print its own errors, over several lines and with exit code 1; ask it to raise them instead.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    compose_and_run = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(task)
    composed_code = _guarded(lambda: compose_and_run() or EXIT_OK)
    sys.exit(max(exit_codes, default=composed_code))


def _call(entry: Callable[[Any, Console], int], composed: DictConfig) -> int:
    config = to_config(composed)
    with Console(tensorflow_messages=config.console.tensorflow_messages) as console:
        return entry(config, console)


def _guarded(action: Callable[[], int]) -> int:
    """The action's exit code, or that of the error it ended with, which is printed as one line."""
    try:
        return action()
    except UserError as error:
        return _report(EXIT_USER_ERROR, str(error))
    except (HydraException, OmegaConfBaseException) as error:
        return _report(EXIT_USER_ERROR, explain(error))
    except TrainingFailed as error:
        return _report(EXIT_FAILURE, str(error))
    except KeyboardInterrupt:
        return _report(EXIT_INTERRUPTED, "interrupted")


def _report(code: int, message: str) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code


def explain(error: Exception) -> str:
    """What Hydra or OmegaConf found wrong, in one line that says what to do."""
    cause = error
    while cause.__cause__ is not None and isinstance(cause.__cause__, (HydraException, OmegaConfBaseException)):
        cause = cause.__cause__
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={choice}: no such choice; choose one of {', '.join(error.options)}"
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and cause.full_key:
        return f"{cause.full_key}: no such key{_suggest(cause)}; see --help for all keys"
    message = " ".join((cause.msg if isinstance(cause, OmegaConfBaseException) and cause.msg else str(cause)).split())
    key = getattr(cause, "full_key", None)
    return f"{key}: {message}" if key else message


def _suggest(error: OmegaConfBaseException) -> str:
    """The key that was probably meant, among those of the dataclass that has no such key."""
    known = [f.name for f in fields(error.object_type)] if is_dataclass(error.object_type) else []
    prefix, _, name = str(error.full_key).rpartition(".")
    matches = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {'.'.join(filter(None, [prefix, *matches]))}?" if matches else ""
