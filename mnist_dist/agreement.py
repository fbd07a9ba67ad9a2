"""Whether all processes of a job mean the same thing: compared once, before anything is trained."""

import json
from collections.abc import Mapping, Sequence

from mnist_dist.errors import UserError


def find_disagreement(facts: Sequence[Mapping[str, str]]) -> str | None:
    """The first difference between rank 0's facts and another rank's, in words that name rank and key; or None."""
    first = facts[0]
    for rank, other in enumerate(facts):
        for key in sorted({*first, *other}):
            if first.get(key) != other.get(key):
                return f"rank {rank} has {key}={other.get(key)}, rank 0 has {key}={first.get(key)}"
    return None


def check_agreement(gathered: Sequence[str]) -> None:
    """Check the facts of all ranks, each a JSON object as `to_text` makes it.

    Raises:
        UserError: they differ; the message names the rank and the key.
    """
    difference = find_disagreement([json.loads(text) for text in gathered])
    if difference is not None:
        raise UserError(f"the processes of this job do not agree: {difference}; start all of them alike")


def to_text(facts: Mapping[str, object]) -> str:
    """Facts as text that can be sent to the other ranks."""
    return json.dumps({key: str(value) for key, value in facts.items()})
