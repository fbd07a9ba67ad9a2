"""Which TensorFlow operations give different bits with another number of threads: the table of docs/threads.md.

    python docs/measure_threads.py

runs itself once for each number of threads (`THREADS`; more threads than cores show it too), compares the digests of
each operation's result with those of one thread, and prints the table. About three minutes on two cores.
"""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

THREADS = (1, 2, 7, 8, 64)
ROWS = (64, 256, 512, 1024, 2048, 4096, 6188, 12375, 24750, 49500)
MAX_ELEMENTS = 10**8


def main() -> None:
    """One number of threads, or all of them and the table."""
    if sys.argv[1:]:
        print(json.dumps(digests(int(sys.argv[1]))))
        return
    found = {}
    for threads in THREADS:
        output = subprocess.run([sys.executable, __file__, str(threads)], check=True, stdout=subprocess.PIPE).stdout
        found[threads] = json.loads(output.splitlines()[-1])
    print("| operation | shapes | type | bits differ from 1 thread |\n|---|---|---|---|")
    rows: dict[tuple[str, str, str], dict[tuple[int, ...], list[str]]] = defaultdict(lambda: defaultdict(list))
    for key, digest in found[1].items():
        dtype, operation, shape, num_rows = key.split("|")
        different = tuple(threads for threads in THREADS if found[threads][key] != digest)
        rows[operation, shape, dtype][different].append(num_rows)
    for (operation, shape, dtype), cases in rows.items():
        texts = [
            f"{', '.join(map(str, threads))} threads: n = {', '.join(numbers)}"
            for threads, numbers in cases.items()
            if threads
        ]
        print(f"| {operation} | {shape} | {dtype} | {'; '.join(texts) or 'none'} |")


def digests(threads: int) -> dict[str, str]:
    """A digest of the result of every operation, type and shape."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.get_logger().setLevel("ERROR")
    generator = np.random.default_rng(0)
    found = {}
    for dtype, num_rows in itertools.product((tf.float32, tf.bfloat16), ROWS):

        def normal(*shape: int, dtype: Any = dtype) -> Any:
            return tf.cast(generator.standard_normal(shape, np.float32), dtype)

        for operation, shape, compute in operations(tf, num_rows, normal):
            result = tf.cast(tf.function(compute, autograph=False)(), tf.float32).numpy()
            digest = hashlib.sha256(np.ascontiguousarray(result)).hexdigest()
            found[f"{dtype.name}|{operation}|{shape}|{num_rows}"] = digest
    return found


def operations(tf: Any, n: int, normal: Callable[..., Any]) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Those of a step of the recipe and of the convolutional network, for `n` rows."""
    images, hidden, upstream, logits = normal(n, 784), normal(n, 256), normal(n, 256), normal(n, 10)
    first, second, third = normal(784, 256), normal(256, 256), normal(256, 10)
    matmul = tf.matmul
    yield "MatMul, forward", "(n,784) (784,256)", lambda: matmul(images, first)
    yield "MatMul, forward", "(n,256) (256,256)", lambda: matmul(hidden, second)
    yield "MatMul, forward", "(n,256) (256,10)", lambda: matmul(hidden, third)
    yield "MatMul, gradient of weights", "(784,n) (n,256)", lambda: matmul(images, upstream, transpose_a=True)
    yield "MatMul, gradient of weights", "(256,n) (n,256)", lambda: matmul(hidden, upstream, transpose_a=True)
    yield "MatMul, gradient of weights", "(256,n) (n,10)", lambda: matmul(hidden, logits, transpose_a=True)
    yield "MatMul, gradient of input", "(n,256) (256,256)", lambda: matmul(upstream, second, transpose_b=True)
    yield "MatMul, gradient of input", "(n,10) (10,256)", lambda: matmul(logits, third, transpose_b=True)
    yield "BiasAddGrad", "(n,256)", lambda: tf.raw_ops.BiasAddGrad(out_backprop=upstream)
    yield "BiasAddGrad", "(n,10)", lambda: tf.raw_ops.BiasAddGrad(out_backprop=logits)
    if logits.dtype == tf.float32:
        labels = tf.one_hot(tf.range(n) % 10, 10)
        losses = tf.nn.softmax_cross_entropy_with_logits(labels, logits)
        yield "softmax, cross-entropy", "(n,10)", lambda: tf.nn.softmax_cross_entropy_with_logits(labels, logits)
        yield "Sum", "(n,)", lambda: tf.reduce_sum(losses)
        yield "Sum over rows", "(n,256)", lambda: tf.reduce_sum(upstream, axis=0)
    for side, channels, filters in ((28, 1, 16), (14, 16, 32)):
        if n * side * side * filters <= MAX_ELEMENTS:
            yield from convolutions(tf, n, side, channels, filters, normal)


def convolutions(
    tf: Any, n: int, side: int, channels: int, filters: int, normal: Callable[..., Any]
) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Those of one convolution with pooling."""
    shape = f"(n,{side},{side},{channels}) to {filters}"
    images, kernel, upstream = (
        normal(n, side, side, channels),
        normal(3, 3, channels, filters),
        normal(n, side, side, filters),
    )
    outputs = tf.nn.conv2d(images, kernel, 1, "SAME")
    pooled = tf.nn.max_pool2d(outputs, 2, 2, "SAME")
    same = {"strides": [1, 1, 1, 1], "padding": "SAME"}
    yield "Conv2D", shape, lambda: tf.nn.conv2d(images, kernel, 1, "SAME")
    yield (
        "Conv2DBackpropFilter",
        shape,
        lambda: tf.raw_ops.Conv2DBackpropFilter(input=images, filter_sizes=kernel.shape, out_backprop=upstream, **same),
    )
    yield (
        "Conv2DBackpropInput",
        shape,
        lambda: tf.raw_ops.Conv2DBackpropInput(input_sizes=images.shape, filter=kernel, out_backprop=upstream, **same),
    )
    yield "BiasAddGrad", f"(n,{side},{side},{filters})", lambda: tf.raw_ops.BiasAddGrad(out_backprop=upstream)
    yield (
        "MaxPool, gradient",
        shape,
        lambda: tf.raw_ops.MaxPoolGrad(
            orig_input=outputs,
            orig_output=pooled,
            grad=tf.ones_like(pooled) * tf.cast(0.1, pooled.dtype),
            ksize=[1, 2, 2, 1],
            strides=[1, 2, 2, 1],
            padding="SAME",
        ),
    )


if __name__ == "__main__":
    main()
