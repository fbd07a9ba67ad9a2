"""The loss of a batch: categorical cross-entropy of logits."""

import tensorflow as tf


def smoothed(slopes: tf.Tensor, labels: tf.Tensor, smoothing: float) -> tf.Tensor:
    """The derivative of the cross-entropy with smoothed labels, from that with plain ones.

    The targets are `1 - smoothing` for the right class, and `smoothing / classes` more for every class.
    """
    if not smoothing:
        return slopes
    num_classes = slopes.shape[1]
    return slopes + smoothing * (tf.one_hot(labels, num_classes) - 1 / num_classes)


def cross_entropy(logits: tf.Tensor, labels: tf.Tensor, *, fused: bool) -> tuple[tf.Tensor, tf.Tensor]:
    """Each row's loss, shape (rows,), and its derivative by the logits, shape (rows, classes).

    Args:
        logits: (rows, classes) float32.
        labels: (rows,) the right classes.
        fused: use TensorFlow's kernel, which computes both at once. On GPUs its last bits vary from call to call, and
            it refuses to run once TensorFlow is told to be deterministic.
    """
    if fused:
        losses, slopes = tf.raw_ops.SparseSoftmaxCrossEntropyWithLogits(features=logits, labels=labels)
        return losses, slopes
    # Not `tf.nn.sparse_softmax_cross_entropy_with_logits`: its derivative there sorts, to sum over equal indices.
    log_probabilities = tf.nn.log_softmax(logits)
    targets = tf.one_hot(labels, logits.shape[1])
    return -tf.reduce_sum(targets * log_probabilities, axis=1), tf.exp(log_probabilities) - targets
