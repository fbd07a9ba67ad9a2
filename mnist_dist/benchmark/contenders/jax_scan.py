"""A rival in JAX: an epoch with its validation as one compiled call, a `lax.scan` over the steps."""

import itertools
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.example_libraries import optimizers

from mnist_dist.benchmark.protocol import Turns
from mnist_dist.data.splits import Splits

BATCH_SIZE = 512
_TYPES = {"float32": jnp.float32, "mixed_bfloat16": jnp.bfloat16, "mixed_float16": jnp.float16}
_DROPOUT = 0.4


def take_part(turns: Turns, splits: Splits, *, precision: str) -> None:
    """Train until the benchmark has enough."""
    dtype = _TYPES[precision]
    train, val = ((jnp.asarray(split.images, dtype), jnp.asarray(split.labels)) for split in (splits.train, splits.val))
    sizes = [splits.train.images.shape[1], 256, 256, splits.num_classes]
    run_epoch, state = _build(sizes, dtype=dtype)
    gpus = [device.device_kind for device in jax.devices() if device.platform == "gpu"]
    turns.ready({"framework": f"jax {jax.__version__}", "gpus": gpus, "precision": precision})
    generator = np.random.default_rng(0)
    while True:
        turns.wait()
        start = time.perf_counter()
        order = generator.permutation(len(splits.train)).astype(np.int32)
        state, loss_sum, num_correct = run_epoch(state, order, train, val)
        # Reading a number waits for the device, so that the time includes all work.
        loss, val_accuracy = loss_sum.item() / len(splits.train), num_correct.item() / len(splits.val)
        turns.done(seconds=time.perf_counter() - start, loss=loss, val_accuracy=val_accuracy)


def _build(sizes: list[int], *, dtype: Any) -> tuple[Any, Any]:
    """The compiled epoch, and its first state: number of the step, weights with Adam's moments, random key."""
    init, update, weights_of = optimizers.adam(1e-3, eps=1e-7)
    # Small gradients are zero in float16; JAX has no loss scaler, but for this network a fixed factor does.
    loss_scale = 1024.0 if dtype == jnp.float16 else 1.0

    def logits_of(weights: Any, images: Any, key: Any = None) -> Any:
        """Without a key there is no dropout."""
        values = images
        for layer, (kernel, bias) in enumerate(weights):
            values = values @ kernel.astype(dtype) + bias.astype(dtype)
            if layer < len(weights) - 1:
                values = jax.nn.relu(values)
                if key is not None:
                    keep = jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - _DROPOUT, values.shape)
                    values = jnp.where(keep, values / (1 - _DROPOUT), 0)
        return values.astype(jnp.float32)

    def loss_of(weights: Any, images: Any, labels: Any, key: Any) -> Any:
        losses = -jnp.sum(labels * jax.nn.log_softmax(logits_of(weights, images, key)), axis=1)
        return losses.mean() * loss_scale

    def train_step(state: Any, rows: Any, images: Any, labels: Any) -> Any:
        step, slots, key = state
        step_key = jax.random.fold_in(key, step)
        loss, gradients = jax.value_and_grad(loss_of)(weights_of(slots), images[rows], labels[rows], step_key)
        gradients = jax.tree.map(lambda gradient: gradient / loss_scale, gradients)
        return (step + 1, update(step, gradients, slots), key), loss / loss_scale * len(rows)

    @partial(jax.jit, donate_argnums=0)
    def run_epoch(state: Any, order: Any, train: Any, val: Any) -> Any:
        """The next state, the sum of losses over the examples, and the number of validation images that are correct."""
        step = partial(train_step, images=train[0], labels=train[1])
        num_whole = len(order) // BATCH_SIZE * BATCH_SIZE
        state, losses = jax.lax.scan(step, state, order[:num_whole].reshape(-1, BATCH_SIZE))
        loss_sum = losses.sum()
        if num_whole < len(order):  # the last batch is smaller
            state, loss = step(state, order[num_whole:])
            loss_sum += loss
        logits = logits_of(weights_of(state[1]), val[0])
        return state, loss_sum, (logits.argmax(axis=1) == val[1].argmax(axis=1)).sum()

    key, *layer_keys = jax.random.split(jax.random.key(0), len(sizes))
    he_normal = jax.nn.initializers.he_normal()
    shapes = itertools.pairwise(sizes)
    weights = [(he_normal(one, shape), jnp.zeros(shape[1])) for one, shape in zip(layer_keys, shapes, strict=True)]
    return run_epoch, (0, init(weights), key)
