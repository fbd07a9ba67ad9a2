"""`predictions.npz`: which examples of each split are classified correctly, and the test images most surely wrong."""

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mnist_dist.base.array import Array

PREDICTIONS = "predictions.npz"

NUM_PAIRS, PER_PAIR, NUM_WORST = 8, 6, 24
"""Mistakes that are kept as pictures: so many of each of the most frequent pairs of classes, and so many of all."""
_MAX_BYTES = 2**21
"""Most bytes that these pictures may have together."""


class Answers(NamedTuple):
    """What the model says to each example of a split, in the order of the split."""

    predicted: npt.NDArray[np.int64]
    """(examples,) class numbers."""
    probability: npt.NDArray[np.float32]
    """(examples,) what the model gives the predicted class."""


@dataclass(frozen=True)
class SplitPredictions:
    """What became of one split."""

    confusion: npt.NDArray[np.int64]
    """(num_classes, num_classes): [i, j] counts the examples of class i that were predicted as class j."""
    correct: npt.NDArray[np.bool_]
    """(examples,) which were predicted correctly."""


@dataclass(frozen=True)
class Mistakes:
    """Test images that were classified wrongly, the most confident first."""

    images: Array
    """(mistakes, height, width) or (mistakes, height, width, channels), uint8."""
    example: npt.NDArray[np.int64]
    """Their numbers in the test set, from 0."""
    label: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    probability: npt.NDArray[np.float32]
    """What the model gives the predicted class."""


@dataclass(frozen=True)
class Predictions:
    """The content of `predictions.npz`."""

    class_names: tuple[str, ...]
    splits: Mapping[str, SplitPredictions]
    """By name: train, val, test."""
    mistakes: Mistakes

    def to_bytes(self) -> bytes:
        """As an archive of NumPy; a bit for each example."""
        arrays: dict[str, Array] = {"class_names": np.array(self.class_names, dtype=np.str_)}
        for name, split in self.splits.items():
            arrays[f"{name}_confusion"] = split.confusion
            arrays[f"{name}_correct"] = np.packbits(split.correct)
        for name in Mistakes.__dataclass_fields__:
            arrays[f"mistakes_{name}"] = getattr(self.mistakes, name)
        stream = io.BytesIO()
        np.savez_compressed(stream, allow_pickle=False, **arrays)
        return stream.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Predictions":
        """Read what `to_bytes` made; raises ValueError for anything else."""
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as archive:
                arrays = dict(archive)
            names = [key.removesuffix("_confusion") for key in arrays if key.endswith("_confusion")]
            splits = {name: _split_from(arrays, name) for name in names}
            mistakes = Mistakes(**{name: arrays[f"mistakes_{name}"] for name in Mistakes.__dataclass_fields__})
            found = cls(tuple(map(str, arrays["class_names"])), splits, mistakes)
            _check_sizes(found)
        except Exception as error:  # zipfile, the decompressors and NumPy raise many kinds for bad bytes
            raise ValueError(f"it is not such an archive ({error})") from error
        return found


def _check_sizes(found: Predictions) -> None:
    num_classes, wrong = len(found.class_names), found.mistakes
    if "test" not in found.splits or any(
        split.confusion.shape != 2 * (num_classes,) for split in found.splits.values()
    ):
        raise ValueError("the confusion matrices do not fit the classes")
    columns = (wrong.example, wrong.label, wrong.predicted, wrong.probability)
    if wrong.images.ndim not in (3, 4) or any(column.shape != wrong.images.shape[:1] for column in columns):
        raise ValueError("the mistakes do not fit each other")
    if any((column < 0).any() or (column >= num_classes).any() for column in (wrong.label, wrong.predicted)):
        raise ValueError("the mistakes are of other classes")


def _split_from(arrays: Mapping[str, Array], name: str) -> SplitPredictions:
    confusion = arrays[f"{name}_confusion"]
    correct = np.unpackbits(arrays[f"{name}_correct"], count=int(confusion.sum())).astype(np.bool_)
    if correct.sum() != np.trace(confusion):
        raise ValueError(f"who was right in the {name} split does not fit its confusion matrix")
    return SplitPredictions(confusion, correct)


def find_mistakes(
    answers: Answers, *, labels: npt.NDArray[np.int64], images: npt.NDArray[np.float32], image_shape: Sequence[int]
) -> Mistakes:
    """The mistakes worth a picture: of the most frequent pairs of classes, and of all, those the model was surest of.

    Args:
        answers: for the examples of a split.
        labels: (examples,) their classes.
        images: (examples, pixels) in 0..1.
        image_shape: of one image.
    """
    wrong = np.flatnonzero(answers.predicted != labels)
    wrong = wrong[np.argsort(-answers.probability[wrong], kind="stable")]
    chosen = list(wrong[:NUM_WORST])
    pairs = list(zip(labels[wrong].tolist(), answers.predicted[wrong].tolist(), strict=True))
    for pair, _ in Counter(pairs).most_common(NUM_PAIRS):
        chosen += [example for example, other in zip(wrong, pairs, strict=True) if other == pair][:PER_PAIR]
    most = max(1, _MAX_BYTES // math.prod(image_shape))
    index = wrong[np.isin(wrong, chosen)][:most]
    return Mistakes(
        images=np.rint(255 * images[index]).astype(np.uint8).reshape(-1, *image_shape),
        example=index,
        label=labels[index],
        predicted=answers.predicted[index],
        probability=answers.probability[index],
    )
