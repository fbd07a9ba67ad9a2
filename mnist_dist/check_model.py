"""Whether your own network can be trained: `python -m mnist_dist.check_model model.factory=package.module:function`."""

import logging
from dataclasses import replace

import numpy as np

from mnist_dist.base.console import Console
from mnist_dist.base.errors import EXIT_OK, UserError
from mnist_dist.cli.main import run
from mnist_dist.config.compose import Command
from mnist_dist.config.model import KerasConfig
from mnist_dist.config.train import TrainConfig
from mnist_dist.data.load import load_dataset
from mnist_dist.launch.topology import Topology

log = logging.getLogger("mnist_dist.check_model")  # __name__ is __main__ when run with -m


class CheckModelConfig(TrainConfig):
    """All keys of `python -m mnist_dist.check_model`: those of train, of which model and data matter."""


def check_model(config: CheckModelConfig, topology: Topology, console: Console) -> int:
    """Build the network, try it on images like those of the data, and print the verdict on every layer."""
    if topology.world_size > 1:
        raise UserError(f"{topology.world_size} processes were started; this check needs one")
    model = config.model
    if not isinstance(model, KerasConfig):
        raise UserError(f"model={model.name}: a network of this package, which can be trained; give model=keras")
    dataset = load_dataset(config.data)
    image_shape, num_classes = dataset.x_train.shape[1:], len(np.unique(dataset.y_train))
    with console.tensorflow_start(messages=config.console.tensorflow_messages):
        from mnist_dist.engine.network import check_verdicts, load_pretrained, try_own_network
        from mnist_dist.engine.precision import choose_precision
        from mnist_dist.engine.verdicts import format_verdicts

        policy = choose_precision(config.precision.name, None)
        config = replace(config, precision=replace(config.precision, name=policy))
        network, verdicts = try_own_network(config, image_shape=image_shape, num_classes=num_classes)
        if model.pretrained is not None:
            load_pretrained(network, model.pretrained, image_shape=image_shape, num_classes=num_classes)
    for line in format_verdicts(verdicts):
        log.info("%s", line)
    check_verdicts(model, verdicts, is_exact=config.reproducibility == "exact")
    log.info(
        "%s: %s weights to train; images of %s, %d classes; every layer can be trained%s",
        model.factory,
        f"{network.num_parameters:,}",
        "x".join(map(str, image_shape)),
        num_classes,
        "" if all(one.word == "exact" for one in verdicts) else ", some with reproducibility=fast only",
    )
    return EXIT_OK


def main() -> None:
    """The console script."""
    run(Command("check_model", CheckModelConfig), check_model)


if __name__ == "__main__":
    main()
