"""The main rival: the recipe as one would write it with Keras' `fit`."""

import time
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from mnist_dist.benchmark.protocol import Turns
from mnist_dist.data.splits import Splits

BATCH_SIZE = 512
_ENDLESS = 1_000_000


class _TurnByTurn(keras.callbacks.Callback):  # type: ignore[misc]
    """Lets one call of `fit` train one epoch per turn: a call for each epoch would copy all data each time."""

    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self._turns = turns
        self._start = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Wait."""
        self._turns.wait()
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Answer; the time includes validation."""
        seconds = time.perf_counter() - self._start
        self._turns.done(seconds=seconds, loss=float(logs["loss"]), val_accuracy=float(logs["val_accuracy"]))


def take_part(turns: Turns, splits: Splits, *, precision: str, options: Mapping[str, str]) -> None:
    """Train until the benchmark has enough; without options `compile` is called as in the recipe."""
    keras.utils.set_random_seed(0)
    keras.mixed_precision.set_global_policy(precision)
    train, val = splits.train, splits.val
    layers = [keras.layers.Input((train.images.shape[1],))]
    for _ in range(2):
        layers += [
            keras.layers.Dense(256, activation="relu", kernel_initializer="he_normal"),
            keras.layers.Dropout(0.4),
        ]
    layers.append(keras.layers.Dense(splits.num_classes, activation="softmax", dtype="float32"))
    model = keras.Sequential(layers)
    arguments: dict[str, Any] = {}
    if "jit_compile" in options:
        arguments["jit_compile"] = options["jit_compile"] == "true"
    if "steps_per_execution" in options:
        steps = options["steps_per_execution"]
        arguments["steps_per_execution"] = -(-len(train) // BATCH_SIZE) if steps == "epoch" else int(steps)
    optimizer = keras.optimizers.Adam(1e-3)
    model.compile(optimizer=optimizer, loss="categorical_crossentropy", metrics=["accuracy"], **arguments)
    turns.ready({**describe_tensorflow(), "precision": precision, "jit_compile": str(model.jit_compile)})
    model.fit(
        train.images,
        train.labels,
        batch_size=BATCH_SIZE,
        epochs=_ENDLESS,
        validation_data=(val.images, val.labels),
        verbose=0,
        callbacks=[_TurnByTurn(turns)],
    )


def describe_tensorflow() -> dict[str, Any]:
    """Version, threads (0 is TensorFlow's default: one for each core) and GPUs of this process."""
    return {
        "framework": f"tensorflow {tf.__version__}, keras {keras.__version__}",
        "intra_op_threads": tf.config.threading.get_intra_op_parallelism_threads(),
        "inter_op_threads": tf.config.threading.get_inter_op_parallelism_threads(),
        "gpus": [
            tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name)
            for gpu in tf.config.list_physical_devices("GPU")
        ],
    }
