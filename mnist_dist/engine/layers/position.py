"""Which rows of which step are being computed, and random numbers that depend on nothing else.

A network is called for some of the rows of a global batch. Whatever its layers draw is a pure function of (seed, global
step, stream, position in the global batch), so any device draws the same numbers for its rows as a single device would.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import tensorflow as tf

PHILOX = 1  # TensorFlow's number for the counter-based generator of Salmon et al. 2011 (SC'11)
_WORDS_PER_TICK = 4  # one tick of its counter gives 128 bits


class BatchPosition(NamedTuple):
    """Which rows of which step are being computed."""

    first_row: tf.Tensor
    """Scalar int64: position in the global batch of the first of these rows."""
    global_step: tf.Tensor
    """Scalar int64: optimizer steps made so far."""

    def counter(self) -> tf.Tensor:
        """Both, (2,) int64, for `random_words`."""
        return tf.stack(self)


@dataclass(frozen=True)
class BatchRows:
    """Some rows of a global batch: one or several whole virtual shards."""

    position: BatchPosition
    weights: tf.Tensor
    """(rows,) float32: 1 for an example, 0 for padding."""
    rows_per_shard: int
    counter: tf.Tensor = field(init=False)
    """That of the position, made once for all layers: every operation costs a GPU time."""
    moments: dict[str, list[tf.Tensor]] = field(default_factory=dict)
    """What the layers of batch normalisation add, by the path of the layer (`layers.batch_norm`)."""
    num_calls: Counter[int] = field(default_factory=Counter)
    """How often each random layer was called; a layer may be used several times."""
    seeded: set[int] = field(default_factory=set)
    """Which states of random generators were set (`layers.by_shard`), by `id`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "counter", self.position.counter())

    @property
    def num_shards(self) -> int:
        """How many virtual shards these rows are."""
        return int(self.weights.shape[0]) // self.rows_per_shard

    def slices(self) -> list[slice]:
        """Where the shards are in these rows."""
        size = self.rows_per_shard
        return [slice(shard * size, (shard + 1) * size) for shard in range(self.num_shards)]

    def cut(self, values: Any, part: slice) -> Any:
        """This part of whatever has these rows, in a structure of values."""

        def cut(value: Any) -> Any:
            has_rows = tf.is_tensor(value) and value.shape.rank and value.shape[0] == self.weights.shape[0]
            return value[part] if has_rows else value

        return tf.nest.map_structure(cut, values)

    def shards(self) -> "list[BatchRows]":
        """These rows shard by shard, none of which has been computed further than these rows have."""
        first_row, step = self.position
        return [
            BatchRows(
                BatchPosition(first_row + part.start, step),
                self.weights[part],
                self.rows_per_shard,
                num_calls=Counter(self.num_calls),
            )
            for part in self.slices()
        ]

    def gather(self, shards: "Sequence[BatchRows]") -> None:
        """Take over what computing these rows shard by shard has found."""
        for path in shards[0].moments:
            parts = zip(*(one.moments[path] for one in shards), strict=True)
            self.add_moments(path, [tf.add_n(part) for part in parts])
        self.num_calls.update(shards[0].num_calls - self.num_calls)
        self.seeded.update(shards[0].seeded)

    def add_moments(self, path: str, moments: list[tf.Tensor]) -> None:
        """Note what a layer adds; raises ValueError for the second time, as it has one moving average for both."""
        if path in self.moments:
            raise ValueError(f"{path} is called twice in a step")
        self.moments[path] = moments


_rows: ContextVar[BatchRows] = ContextVar("rows")


@contextmanager
def computing(rows: BatchRows) -> Iterator[None]:
    """Tell the layers which rows they are called for, while the block is traced."""
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


def current_rows() -> BatchRows:
    """The rows that layers are being called for; raises ValueError if nobody said so: in inference."""
    if (rows := _rows.get(None)) is None:
        raise ValueError("a layer behaves in inference as if it were training: random numbers would be drawn there")
    return rows


def stream_key(seed: int, stream: int) -> int:
    """The key of one of the independent streams of a run: of a layer by its number, from 1; 0 is for the images."""
    return (seed << 32) | stream


def layer_key(seed: int, layer: int) -> int:
    """The key of the stream of a layer, by its number from 1, for its next call in the rows that are being computed."""
    num_calls = current_rows().num_calls
    num_calls[layer] += 1
    return stream_key(seed, (num_calls[layer] - 1) << 16 | layer)


def random_words(key: int, counter: tf.Tensor, *, num_rows: int, num_words: int) -> tf.Tensor:
    """Random bits, (num_rows, at least num_words) uint32, as whole ticks of Philox's counter.

    Row i is that of position `first_row + i` (`counter` is a `BatchPosition.counter()`): each row owns a range of ticks
    of the low half of Philox's counter, and the step is the high half.
    """
    ticks = -(-num_words // _WORDS_PER_TICK)
    counter = counter * tf.constant([ticks, 1], tf.int64)
    return tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=[num_rows, ticks * _WORDS_PER_TICK],
        key=tf.constant([key], tf.uint64),
        counter=tf.bitcast(counter, tf.uint64),
        alg=PHILOX,
        dtype=tf.uint32,
    )


def uniform(key: int, counter: tf.Tensor, *, num_rows: int, num_values: int) -> tf.Tensor:
    """Numbers in [0, 1), (num_rows, num_values) float32, each a multiple of 2**-24."""
    words = random_words(key, counter, num_rows=num_rows, num_words=num_values)[:, :num_values]
    return tf.cast(tf.bitwise.right_shift(words, tf.constant(8, tf.uint32)), tf.float32) * 2.0**-24
