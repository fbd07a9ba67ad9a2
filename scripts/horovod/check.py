"""One rank of the all-reduce that checks a Horovod build: `horovodrun --gloo -np 2 python check.py`.

Exits non-zero unless there are as many ranks as expected and every rank got the right sum.
"""

import sys

import horovod.tensorflow as hvd
import tensorflow as tf


def main() -> int:
    expected_size = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    hvd.init()
    rank, size = hvd.rank(), hvd.size()

    # NCCL refuses two ranks on one GPU, so GPUs are used only if there is one for every rank.
    gpus = tf.config.list_physical_devices("GPU")
    on_gpu = hvd.nccl_built() and len(gpus) >= hvd.local_size()
    tf.config.set_visible_devices(gpus[hvd.local_rank()] if on_gpu else [], "GPU")

    @tf.function
    def reduce(tensor: tf.Tensor) -> tf.Tensor:
        return hvd.allreduce(tensor, op=hvd.Sum, name="check")

    with tf.device("/GPU:0" if on_gpu else "/CPU:0"):
        # Every element and every rank differs, so that mixing up ranks or elements changes the
        # sum; whole numbers, so that it is exact.
        elements = tf.range(1000, dtype=tf.float32)
        total = reduce(elements * float(rank + 1))
        expected = elements * float(size * (size + 1) // 2)
        right = bool(tf.reduce_all(total == expected))

    print(
        f"rank {rank} of {size}: sum {'right' if right else 'WRONG'} on {'GPU' if on_gpu else 'CPU'},"
        f" gloo_built={bool(hvd.gloo_built())} nccl_built={bool(hvd.nccl_built())},"
        f" TensorFlow {tf.__version__}",
        flush=True,
    )
    hvd.shutdown()
    if size != expected_size:
        # A rank that started alone sums only its own tensor, which shows nothing.
        print(f"expected {expected_size} ranks, got {size}", file=sys.stderr)
        return 1
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
