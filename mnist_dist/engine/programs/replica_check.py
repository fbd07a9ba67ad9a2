"""Whether all replicas still have the same state."""

from collections import Counter
from collections.abc import Callable

import tensorflow as tf

from mnist_dist.base.errors import TrainingFailed
from mnist_dist.engine.checksum import checksum, odd_factors
from mnist_dist.engine.programs.state import TrainState
from mnist_dist.strategy.base import Strategy


class ReplicaCheck:
    """Compares the training state of all replicas, which must be bit-identical.

    The digests are sent together with requests to stop, so that all processes stop after the same epoch.
    """

    def __init__(
        self, *, strategy: Strategy, state: TrainState, wants_to_stop: Callable[[], bool] = lambda: False
    ) -> None:
        self._wants_to_stop = wants_to_stop
        self._strategy = strategy
        self._vectors = [*state.model, *state.slots]
        self._factors = strategy.replicate(odd_factors(sum(int(vector.shape[0]) for vector in self._vectors)))
        self._compiled = tf.function(self._digests, autograph=False)

    def run(self, epoch: int) -> bool:
        """Whether any process wants to stop, the same answer on all of them; a collective.

        Raises:
            TrainingFailed: the state is not the same on all replicas; the message names those that differ.
        """
        request = tf.constant(int(self._wants_to_stop()), tf.int64)
        *digests, num_requests = self._compiled(self._factors, request).numpy().tolist()
        common, votes = Counter(digests).most_common(1)[0]
        if votes == len(digests):
            return bool(num_requests)
        if votes == 1:
            which = f"no two of the {len(digests)} replicas have"
        else:
            others = [str(index) for index, digest in enumerate(digests) if digest != common]
            which = f"replica{'s' if len(others) > 1 else ''} {', '.join(others)} of {len(digests)} did not have"
        when = f"after epoch {epoch}" if epoch else "before the first epoch"
        raise TrainingFailed(
            f"{when} {which} the same weights and optimizer state: a device computes or transmits wrongly, "
            "or the processes run different software; the results of earlier epochs are kept"
        )

    def _digests(self, factors: tf.Tensor, request: tf.Tensor) -> tf.Tensor:
        return self._strategy.run(self._digest_replica, factors, request)

    def _digest_replica(self, factors: tf.Tensor, request: tf.Tensor) -> tf.Tensor:
        """All replicas' digests (sums of words times factors, modulo 2**64), then the sum of their requests."""
        digest = checksum(tf.concat([vector.read_value() for vector in self._vectors], axis=0), factors)
        index, num_replicas = self._strategy.replica_index(), self._strategy.num_replicas
        own = tf.one_hot(index, num_replicas, digest, tf.constant(0, tf.int64))
        return self._strategy.all_reduce_sum(tf.concat([own, [request]], axis=0))
