"""What the checks share: this rank's devices, data and line to rank 0."""

import contextlib
import hashlib
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_dist.base.array import Array
from mnist_dist.base.console import Console
from mnist_dist.config.optimization import SGDConfig
from mnist_dist.data.dataset import ImageDataset
from mnist_dist.data.splits import Splits, preprocess
from mnist_dist.launch.control import Control
from mnist_dist.launch.rendezvous import Rendezvous
from mnist_dist.verify.config import VerifyConfig
from mnist_dist.verify.report import EXPECTED_S

if TYPE_CHECKING:
    from mnist_dist.engine.build import Engine
    from mnist_dist.strategy.base import Strategy

SGD = SGDConfig(name="sgd", learning_rate=0.1, momentum=0.0, nesterov=False)
"""Unlike Adam it shows a gradient of the wrong size."""


class Context:
    """One rank's part in the checks."""

    def __init__(
        self, config: VerifyConfig, dataset: ImageDataset, *, rendezvous: Rendezvous, control: Control, folder: Path
    ) -> None:
        self.asked = config
        self.config = config
        """With each `auto` resolved, once the devices have started; always exact, and in float32."""
        self.dataset = dataset
        self.rendezvous = rendezvous
        self.topology = rendezvous.topology
        self.control = control
        self.folder = folder
        """The run folder; only rank 0 writes there."""
        self.host = self.topology.node_name()
        self.trials: dict[tuple[str, int], dict[str, Any]] = {}
        """Trainings that several checks look at, by precision and number."""
        self.mixed_precision = ""
        """The mixed precision to check."""
        self.devices: list[list[str]] = []
        """Names of each rank's devices, one for each replica, once they have started."""
        self._started: tuple[Strategy, Splits] | None = None
        self._console: Console | None = None

    @property
    def strategy(self) -> "Strategy":
        """The strategy, which `start` has started."""
        assert self._started is not None
        return self._started[0]

    @property
    def splits(self) -> Splits:
        """The data as the engine reads it."""
        assert self._started is not None
        return self._started[1]

    @property
    def is_started(self) -> bool:
        """Whether the devices have started."""
        return self._started is not None

    @property
    def shares_cores(self) -> bool:
        """Whether replicas compete for the cores of a machine, so that more of them are not faster."""
        return not self.strategy.on_gpu and (self.topology.local_size > 1 or len(self.strategy.devices()) > 1)

    def enter(self, phase: str) -> None:
        """Say what comes next, so that a hang can be located."""
        self.control.enter(phase)

    def settle(self, value: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """Rank 0 decides on the values of all ranks; all get what it returns."""
        return self.control.settle(value, decide)

    def start(self, console: Console) -> None:
        """Start TensorFlow, the devices and the backend; a collective."""
        self._console, data = console, self.config.data
        preparing = ThreadPoolExecutor(1).submit(
            preprocess, self.dataset, val_fraction=data.val_fraction, split_seed=data.split_seed
        )
        # It warns of programs that are compiled again and again; here each serves one measurement.
        logging.getLogger("tensorflow").setLevel(logging.ERROR)
        with console.tensorflow_start(messages=self.config.console.tensorflow_messages):
            from mnist_dist.engine.build import start_devices
            from mnist_dist.engine.mode import choose_compiler
            from mnist_dist.engine.precision import choose_precision
            from mnist_dist.strategy.choose import list_gpus

            asked = replace(self.config, reproducibility="exact")
            config, strategy = start_devices(asked, self.rendezvous, num_gpus=len(list_gpus()))
            capability = strategy.compute_capability()
        found = config.precision.name if config.precision.name != "float32" else choose_precision("auto", capability)
        self.mixed_precision = "mixed_bfloat16" if found == "float32" else found
        num_shards = max(config.batch.num_shards, strategy.num_replicas)
        self.config = replace(
            self.config,
            precision=replace(config.precision, name="float32"),
            reproducibility="exact",
            compile=config.compile,
            batch=replace(config.batch, num_shards=num_shards),
            strategy=replace(config.strategy, name=strategy.name),
        )
        self.fast_compiler = choose_compiler(
            self.asked, mode="fast", on_gpu=strategy.on_gpu, is_single=strategy.has_xla_collectives
        )
        self._started = strategy, preparing.result()
        self.devices = self.settle(strategy.devices(), list)

    def assemble(
        self,
        strategy: "Strategy | None" = None,
        *,
        restored: Mapping[str, Array] | None = None,
        **changes: Any,
    ) -> "Engine":
        """A training with these changes of the configuration, from the beginning or rank 0's `restored` state.

        On another strategy if one is given.
        """
        from mnist_dist.engine.build import assemble

        config = replace(self.config, **changes)
        return assemble(config, strategy or self.strategy, self.splits, topology=self.topology, restored=restored)

    def alone(self) -> "Strategy":
        """This process's first device as a strategy of its own: one replica, no collectives."""
        from mnist_dist.strategy.base import SingleDevice

        return SingleDevice(self.strategy.devices()[0])

    def hushed(self) -> contextlib.AbstractContextManager[None]:
        """A block in which TensorFlow's messages stay off the terminal, unless asked for."""
        assert self._console is not None
        return self._console.tensorflow_start(messages=self.config.console.tensorflow_messages)

    def repeats(self, number: int, *, least: int = 3) -> int:
        """How many times to repeat something, within the budget."""
        if self.asked.budget_s is None:
            return number
        fewer = max(least, round(number * min(1.0, self.asked.budget_s / sum(EXPECTED_S.values()))))
        return min(number, fewer)


def digest(content: bytes) -> str:
    """A SHA-256, short enough for tables."""
    return hashlib.sha256(content).hexdigest()[:16]
