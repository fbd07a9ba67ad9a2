"""Random layers of Keras and of users, called for one virtual shard at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from mnist_dist.engine.layers.position import BatchRows, computing, current_rows, layer_key, random_words


class ByShard:
    """Keras' own computation with seeds that depend on the position; takes the place of a `call`.

    Every draw of a layer with a `keras.random.SeedGenerator` is a function of the generator's state. So that state is
    set, for each virtual shard, to a function of (seed, global step, layer, shard): what a shard gets does not depend
    on which device computes it, nor on which shards are computed at once.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        generators: Sequence[keras.random.SeedGenerator],
        *,
        seed: int,
        index: int,
    ) -> None:
        """Wrap `call` of layer number `index` of the network's random layers, which draws from `generators`."""
        self._call = call
        self._generators = generators
        self._seed = seed
        self._index = index

    def __call__(self, *args: Any, **options: Any) -> Any:
        """What the layer computes, shard by shard: (rows, ...) -> (rows, ...)."""
        if not options.get("training", any(value is True for value in args)):
            return self._call(*args, **options)
        rows = current_rows()
        key = layer_key(self._seed, self._index)
        outputs, shards = [], rows.shards()
        for part, own in zip(rows.slices(), shards, strict=True):
            self._set_seeds(key, own)
            with computing(own):
                outputs.append(self._call(*rows.cut(args, part), **rows.cut(options, part)))
        rows.gather(shards)
        return outputs[0] if len(outputs) == 1 else tf.nest.map_structure(lambda *own: tf.concat(own, 0), *outputs)

    def _set_seeds(self, key: int, rows: BatchRows) -> None:
        words = random_words(key, rows.counter, num_rows=1, num_words=2 * len(self._generators))
        for number, generator in enumerate(self._generators):
            generator.state.assign(tf.cast(words[0, 2 * number : 2 * number + 2], generator.state.dtype))
            rows.seeded.add(id(generator.state))
