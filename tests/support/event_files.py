"""Event files as TensorBoard reads them. Without TensorFlow."""

from pathlib import Path
from typing import NamedTuple

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


class Shown(NamedTuple):
    """What TensorBoard shows of one folder: by tag, a list with the step of each value first."""

    scalars: dict[str, list[tuple[int, float]]]
    texts: dict[str, list[tuple[int, str]]]
    images: dict[str, list[tuple[int, int, int]]]
    """With width and height in pixels."""
    accumulator: EventAccumulator


def read_event_files(folder: Path, *, forgets: bool = False) -> Shown:
    """Read what is there; `forgets`: as TensorBoard does it, which would hide from a test that epochs come twice."""
    everything = dict.fromkeys(("scalars", "tensors", "images"), 0)
    accumulator = EventAccumulator(str(folder), size_guidance=everything, purge_orphaned_data=forgets).Reload()
    tags = accumulator.Tags()
    return Shown(
        {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags["scalars"]},
        {
            tag: [(event.step, event.tensor_proto.string_val[0].decode()) for event in accumulator.Tensors(tag)]
            for tag in tags["tensors"]
        },
        {tag: [(event.step, event.width, event.height) for event in accumulator.Images(tag)] for tag in tags["images"]},
        accumulator,
    )
