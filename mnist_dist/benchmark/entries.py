"""The contenders: from a text like `strategy=mirrored strategy.num_replicas=2 precision=float32` to a command.

A text is a command line of `mnist_dist.train`, with `processes=N` for a job of several; or it begins with the name of
a rival (`keras`, `floor`, `torch` or `jax`), followed by the rival's own options.
"""

import importlib.util
import json
import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from mnist_dist.base.errors import UserError
from mnist_dist.cli.command_line import check_override
from mnist_dist.cli.explain import explain
from mnist_dist.config.compose import compose_config

OURS = "ours"
_PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
_RIVAL_OPTIONS = {
    "keras": ("precision", "jit_compile", "steps_per_execution"),
    "floor": ("precision",),
    "torch": ("precision", "compile"),
    "jax": ("precision",),
}
# Rivals that may be missing, with their names.
_OPTIONAL = {"torch": "PyTorch", "jax": "JAX"}
# Keys that are in the name of a contender, and keys that belong to the whole benchmark.
_NAMED_KEYS = ("strategy", "strategy.num_replicas", "reproducibility", "precision")
_SHARED_KEYS = ("data", "run_dir", "trainer", "plots", "console", "experiment")


@dataclass(frozen=True)
class Contender:
    """One of the trainings that are compared."""

    text: str
    kind: str
    """ours | keras | floor | torch | jax."""
    name: str
    precision: str
    overrides: tuple[str, ...] = ()
    """ours: the command line."""
    options: dict[str, str] = field(default_factory=dict)
    """The rivals' options."""
    launcher: str = "none"
    processes: int = 1

    @property
    def is_paused(self) -> bool:
        """Whether it must be paused while others compute: Horovod's ranks communicate every millisecond, even idle."""
        return self.launcher in _PAUSED

    def commands(self, child: Sequence[str]) -> list[list[str]]:
        """The commands that start it; each ends with the words of `child`."""
        # By default the first process allocates most memory of a GPU, and nothing is left for others.
        plain = ["env", "TF_FORCE_GPU_ALLOW_GROWTH=true", "XLA_PYTHON_CLIENT_PREALLOCATE=false"]
        return _LAUNCHERS[self.launcher](plain, child, self.processes)


def _start_one(plain: list[str], child: Sequence[str], _: int) -> list[list[str]]:
    return [[*plain, *child]]


def _start_by_horovodrun(plain: list[str], child: Sequence[str], processes: int) -> list[list[str]]:
    # Gloo must tolerate that all ranks are paused for a while.
    run = [str(horovodrun()), "--gloo", "--gloo-timeout-seconds", "86400", "-np", str(processes)]
    return [[*plain, *run, *child]]


def _start_workers(plain: list[str], child: Sequence[str], processes: int) -> list[list[str]]:
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(processes)]
        addresses = [f"127.0.0.1:{server.getsockname()[1]}" for server in servers]
    tasks = [{"cluster": {"worker": addresses}, "task": {"type": "worker", "index": n}} for n in range(processes)]
    return [[*plain, f"TF_CONFIG={json.dumps(task)}", *child] for task in tasks]


_LAUNCHERS: dict[str, Callable[[list[str], Sequence[str], int], list[list[str]]]] = {
    "none": _start_one,
    "horovod": _start_by_horovodrun,
    "multiworker": _start_workers,
}
_PAUSED = ("horovod",)


def horovodrun() -> Path:
    """The launcher that belongs to this Python."""
    return Path(sys.executable).with_name("horovodrun")


def parse(text: str) -> Contender:
    """The contender that a text describes; raises UserError."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"contenders: {text}: {error}") from error
    if words and words[0] in _RIVAL_OPTIONS:
        return _parse_rival(text, words[0], words[1:])
    if not words or "=" not in words[0]:
        raise UserError(
            f"contenders: {text or repr(text)}: must begin with {', '.join(_RIVAL_OPTIONS)} or be KEY=VALUE of "
            "mnist_dist.train"
        )
    return _parse_ours(text, words)


def _parse_rival(text: str, kind: str, words: Sequence[str]) -> Contender:
    options = dict(word.partition("=")[::2] for word in words)
    unknown = sorted(set(options) - set(_RIVAL_OPTIONS[kind]))
    if unknown:
        raise UserError(f"contenders: {text}: {unknown[0]}: {kind} has the options {', '.join(_RIVAL_OPTIONS[kind])}")
    switch = ("true", "false")
    for key, choices in (("precision", _PRECISIONS), ("jit_compile", switch), ("compile", switch)):
        if options.get(key, choices[0]) not in choices:
            raise UserError(f"contenders: {text}: {key} must be one of {', '.join(choices)}")
    steps = options.get("steps_per_execution", "epoch")
    if steps != "epoch" and _whole_number(steps) is None:
        raise UserError(f"contenders: {text}: steps_per_execution must be a number from 1 to 1024, or epoch")
    if kind in _OPTIONAL and importlib.util.find_spec(kind) is None:
        raise UserError(f"contenders: {text}: {_OPTIONAL[kind]} is not installed (pip install {kind})")
    if options.get("compile") == "true" and not _has_compiler():
        raise UserError(f"contenders: {text}: torch.compile needs a C++ compiler, and g++ is not installed")
    precision = options.pop("precision", "float32")
    extra = "".join(f" {key}={value}" for key, value in options.items())
    return Contender(text, kind=kind, name=kind + extra, precision=precision, options=options)


def _has_compiler() -> bool:
    """Whether there is the compiler that `torch.compile` uses by default."""
    return shutil.which("g++") is not None


def _whole_number(text: str) -> int | None:
    """A number from 1 to 1024; None if `text` is not one."""
    return int(text) if len(text) <= 4 and text.isdecimal() and 1 <= int(text) <= 1024 else None


def _parse_ours(text: str, words: Sequence[str]) -> Contender:
    processes = [word.partition("=")[2] for word in words if word.startswith("processes=")]
    overrides = tuple(word for word in words if not word.startswith("processes="))
    size = _whole_number(processes[-1]) if processes else 1
    if size is None:
        raise UserError(f"contenders: {text}: processes must be a number from 1 to 1024")
    for word in overrides:
        if word.partition("=")[0].split(".")[0] in _SHARED_KEYS:
            raise UserError(f"contenders: {text}: {word}: not a key of a contender")
    try:
        for word in overrides:
            check_override(word)
        config = compose_config(*overrides)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        reason = str(error) if isinstance(error, UserError) else explain(error)
        raise UserError(f"contenders: {text}: {reason}") from error
    strategy = config.strategy.name
    launcher = strategy if strategy in _LAUNCHERS else "none"
    if size > 1 and launcher == "none":
        raise UserError(f"contenders: {text}: several processes need strategy=horovod or strategy=multiworker")
    if launcher in _PAUSED and not horovodrun().is_file():
        raise UserError(f"contenders: {text}: Horovod is not installed; install it with: make horovod")
    count = config.strategy.num_replicas or size
    rest = [word for word in overrides if word.partition("=")[0] not in _NAMED_KEYS]
    parts = [strategy, *([f"x{count}"] if count > 1 else []), config.reproducibility, *rest]
    return Contender(
        text,
        kind=OURS,
        name=" ".join(parts),
        precision=config.precision.name,
        overrides=overrides,
        launcher=launcher,
        processes=size,
    )


def default_texts(*, num_gpus: int) -> list[str]:
    """What is compared by default on a machine with that many GPUs."""
    replicas = max(2, num_gpus)
    places = ["strategy=single"]
    if num_gpus != 1:  # a single GPU allows one replica only; CPUs have logical devices
        places += [f"strategy=mirrored strategy.num_replicas={replicas}"]
        places += [f"strategy=horovod processes={replicas}"] if horovodrun().is_file() else []
        places += [f"strategy=multiworker processes={replicas}"]
    jobs = [f"{place} reproducibility={mode}" for place in places for mode in ("exact", "fast")]
    jobs += ["keras"] + [f"keras jit_compile={jit} steps_per_execution=epoch" for jit in ("false", "true")]
    jobs += ["floor", *(kind for kind in _OPTIONAL if importlib.util.find_spec(kind))]
    jobs += ["torch compile=true"] if "torch" in jobs and _has_compiler() else []
    precisions = _PRECISIONS if num_gpus else _PRECISIONS[:2]
    return [f"{job} precision={precision}" for precision in precisions for job in jobs]
