"""Check 4: does an epoch train on each example exactly once, with its own label?"""

import base64
import zlib
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from mnist_dist.base.array import Array
from mnist_dist.data.dataset import ARRAY_NAMES, ImageDataset
from mnist_dist.engine.build import Engine
from mnist_dist.engine.checksum import checksum, odd_factors
from mnist_dist.engine.programs.placement import DeviceArrays, gather, place_split, rows_of
from mnist_dist.verify.checks.base import Detector, Evidence, Finding, by_replica
from mnist_dist.verify.context import Context
from mnist_dist.verify.replicas import on_each_replica

_CHUNK = 4096


class Data(Detector):
    """Sums each image and label up where they are read on the device, as training does, over one epoch's plan."""

    name = "data"
    needs = ("identity",)

    def measure(self, context: Context) -> Evidence:
        """A checksum for each row that this rank's replicas read, by step and shard."""
        engine = context.assemble()
        indices = engine.plan.shuffled(seed=engine.config.seed, epoch=1)
        context.enter("reading an epoch on the devices")
        sums = _read_epoch(engine, indices)
        file_sums = _file_checksums(context.dataset)
        is_intact = ImageDataset.from_arrays("", {name: getattr(context.dataset, name) for name in ARRAY_NAMES})
        evidence = {
            # Rows that the file of the data set does not have: a rank that reads such is wrong by itself.
            "foreign": [int((~np.isin(own[own != 0], file_sums)).sum()) for own in sums],
            "intact": is_intact.sha256 == context.dataset.sha256,
            "sums": [_to_text(own) for own in sums],
            "shards": engine.shards.num_shards,
            "indices_shape": list(indices.shape),
        }
        if context.topology.is_chief:
            evidence["expected"] = _to_text(_expected(engine, indices))
            planned = np.sort(indices[indices >= 0])
            evidence["plan_is_complete"] = bool(np.array_equal(planned, np.arange(len(engine.splits.train))))
        return evidence

    def judge(self, evidence: Sequence[Evidence]) -> Finding:
        """Compare with the plan: which example each row must hold, and which replica must read it."""
        texts = by_replica(evidence, "sums")
        foreign = by_replica(evidence, "foreign")
        ranks = [rank for rank, one in enumerate(evidence) for _ in one["sums"]]
        steps, rows = evidence[0]["indices_shape"]
        expected = _from_text(evidence[0]["expected"]).reshape(steps, rows)
        by_rank = [0] * len(evidence)
        read = np.zeros((steps, rows), np.int64)
        blamed: dict[int, str] = {}
        # What rank 0 expects means nothing if its own data are wrong.
        is_trusted = evidence[0]["intact"] and not any(evidence[0]["foreign"])
        # Whose shard is whose, by NumPy's own division and not by the engine's.
        shares = np.array_split(np.arange(rows), evidence[0]["shards"])
        for own, share in enumerate(np.array_split(np.arange(len(shares)), len(texts))):
            columns = np.concatenate([shares[shard] for shard in share])
            sums = _from_text(texts[own]).reshape(steps, rows)
            read += sums != 0
            by_rank[ranks[own]] += int((sums != 0).sum())
            mine = np.zeros(rows, bool)
            mine[columns] = True
            num_wrong = int((sums[:, mine] != expected[:, mine]).sum())
            num_others = int((sums[:, ~mine] != 0).sum())
            if foreign[own] or not evidence[ranks[own]]["intact"]:
                blamed[own] = f"{foreign[own]} examples with an image or label that the data set does not have"
            elif num_others and is_trusted:
                blamed[own] = f"it read {num_others} rows of other replicas, and not {num_wrong} of its own"
            elif num_wrong and is_trusted:
                blamed[own] = f"{num_wrong} of its rows hold other examples than planned"
        if not evidence[0]["plan_is_complete"]:
            return Finding("fail", "the plan of an epoch does not have each example exactly once")
        planned = int((expected != 0).sum())
        once = int(((read == 1) & (expected != 0)).sum())
        details = {"examples": planned, "exactly_once": once, "per_rank": by_rank}
        if blamed or once != planned:
            problems = "; ".join(f"replica {replica}: {text}" for replica, text in blamed.items())
            summary = f"{once:,} of {planned:,} examples were read exactly once; {problems or 'no rank is to blame'}"
            return Finding("fail", summary, blamed, details, of="replica")
        return Finding("pass", f"{planned:,} examples, each exactly once and with its label", {}, details)

    def spoil(self, evidence: Sequence[Evidence]) -> int | None:
        """Two neighbours of the last rank exchange places."""
        sums = _from_text(evidence[-1]["sums"][-1]).copy()
        first, second = np.flatnonzero(sums)[:2]
        sums[[first, second]] = sums[[second, first]]
        evidence[-1]["sums"][-1] = _to_text(sums)
        return len(evidence) - 1


def _read_epoch(engine: Engine, indices: Array) -> list[Array]:
    """For each replica of this process the checksum of each row that it reads, (steps, rows); 0 where it reads none."""
    strategy, shards = engine.strategy, engine.shards
    data = place_split(engine.splits.train, strategy)
    num_pixels = engine.splits.train.images.shape[1]
    factors = odd_factors(num_pixels + 1)

    def read(data: DeviceArrays) -> tf.Tensor:
        own = shards.shards_of(strategy.replica_index())
        first, last = own.start * shards.rows_per_shard, own.stop * shards.rows_per_shard

        def step(rows: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
            examples, weights = rows
            images, labels = gather(data, examples[first:last])
            sums = checksum(images, tf.constant(factors[:-1])) + (labels + 1) * tf.constant(factors[-1])
            sums = tf.where(weights[first:last] > 0, sums, tf.zeros_like(sums))
            return tf.pad(sums, [[first, shards.num_rows - last]])

        # In a loop, since all rows at once would need gigabytes.
        return tf.map_fn(step, tuple(map(tf.constant, rows_of(indices))), fn_output_signature=tf.int64)

    return on_each_replica(strategy, read, data.arrays, like=np.zeros(indices.shape, np.int64))


def _host_checksums(images: Array, labels: Array) -> Array:
    factors = odd_factors(images.shape[1] + 1)
    parts = [
        (images[first : first + _CHUNK].view(np.int32).astype(np.int64) * factors[:-1]).sum(axis=1)
        for first in range(0, len(images), _CHUNK)
    ]
    sums: Array = np.concatenate(parts) + (labels + 1) * factors[-1]
    return sums


def _file_checksums(dataset: ImageDataset) -> Array:
    """Those of all training images of the file, whichever split they go to."""
    images = dataset.x_train.reshape(len(dataset.x_train), -1)
    scaled = np.ascontiguousarray(images / 255 if images.dtype == np.uint8 else images, np.float32)
    _, classes = np.unique(dataset.y_train.reshape(-1), return_inverse=True)
    return _host_checksums(scaled, classes.astype(np.int64))


def _expected(engine: Engine, indices: Array) -> Array:
    """The checksum that each row must have, (steps, rows); 0 for padding."""
    train = engine.splits.train
    sums = _host_checksums(train.images, train.labels.argmax(axis=1))
    return np.where(indices >= 0, sums[np.maximum(indices, 0)], 0)


def _to_text(numbers: Array) -> str:
    # Compressed, since most of it is 0: the rows of other replicas.
    return base64.b64encode(zlib.compress(np.ascontiguousarray(numbers, np.int64).tobytes(), 1)).decode()


def _from_text(text: str) -> Array:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.int64)
