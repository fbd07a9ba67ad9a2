"""What a GPU would run for each compiled program, and what it would leave to the host; examined without a GPU."""

from collections import Counter
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import tensorflow as tf

from mnist_dist.base.errors import UserError
from mnist_dist.benchmark.operations import examine
from mnist_dist.config.compose import compose_config
from mnist_dist.data.splits import Split, Splits
from mnist_dist.engine.build import Engine, Programs, build_engine
from mnist_dist.engine.programs.placement import Rows
from mnist_dist.engine.shards import ShardPlan
from mnist_dist.launch.rendezvous import Rendezvous
from mnist_dist.launch.topology import Topology
from mnist_dist.strategy.base import Strategy

NOT_DETERMINISTIC = {
    "SparseSoftmaxCrossEntropyWithLogits", "SoftmaxCrossEntropyWithLogits", "Bincount",
    "DenseBincount", "MaxPoolGradWithArgmax", "ResizeNearestNeighborGrad", "CropAndResizeGradImage", "AdjustContrastv2",
    "Dilation2DBackpropInput", "Dilation2DBackpropFilter", "SparseTensorDenseMatMul", "FakeQuantWithMinMaxVarsGradient",
}  # fmt: skip
"""Operations whose GPU kernels refuse to run with `exact`, as the messages in TensorFlow's libraries say."""


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """Where the package asks whether there is one."""
    monkeypatch.setattr(Strategy, "on_gpu", True)


def make_split(num_examples: int) -> Split:
    rng = np.random.default_rng(0)
    labels = np.eye(10, dtype=np.float32)[np.arange(num_examples) % 10]
    return Split(rng.random((num_examples, 784), np.float32), labels)


def build(*overrides: str, parts: int | None = None) -> Engine:
    """The recipe on small data; `parts` instead of the shards that this machine would have."""
    sizes = (520, 1100, 10)  # in validation two chunks, one of them with padding
    splits = Splits(*map(make_split, sizes), image_shape=(28, 28), class_names=tuple("0123456789"))
    config = compose_config(*overrides)
    engine = build_engine(config, Rendezvous(Topology(), timeout_s=1), splits, num_gpus=0)
    return replace(engine, shards=ShardPlan(parts, 512 // parts, 1)) if parts else engine


def trace_all(engine: Engine) -> dict[str, tf.types.experimental.ConcreteFunction]:
    programs = Programs(engine)
    train, validate, check = programs._train, programs._validate, programs._replica_check
    indices = engine.plan.shuffled(seed=0, epoch=1)
    steps = train.step_inputs(indices, learning_rates=np.ones(len(indices)))
    chunks = Rows(*map(tf.constant, validate._rows))
    return {
        "train": train._compiled.get_concrete_function(steps),
        "a step": programs.trace_step(),
        "evaluate": validate._compiled.get_concrete_function(engine.state.model, chunks),
        "replica check": check._compiled.get_concrete_function(check._factors, tf.constant(0, tf.int64)),
    }


# Small batches of few shards: what is looked for does not depend on the number.
SMALL = {"exact": ["batch.num_shards=2", "batch.global_size=64"], "fast": ["batch.global_size=64"]}
PLACES = {"single": ["strategy=single"], "mirrored x2": ["strategy=mirrored", "strategy.num_replicas=2"]}


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize(
    ("place", "mode", "model"),
    [
        *(("mirrored x2", mode, model) for mode in SMALL for model in ("mlp", "cnn")),
        *(("single", mode, "mlp") for mode in SMALL),
    ],
)
def test_no_operation_on_the_host(place, mode, model, policy):
    engine = build(*PLACES[place], *SMALL[mode], f"reproducibility={mode}", f"model={model}", f"precision={policy}")
    for name, program in trace_all(engine).items():
        found = examine(program)
        assert not found.host, name
        assert found.device, name
        if mode == "exact":
            assert not found.device.keys() & NOT_DETERMINISTIC, name


def int32_arithmetic(x: tf.Tensor) -> tf.Tensor:
    return tf.gather(x, tf.maximum(tf.cast(x[:, 0], tf.int32), 0))


def without_a_kernel(x: tf.Tensor) -> list[tf.Tensor]:
    return tf.split(tf.cast(x, tf.int64), 2)


def shape_from_data(x: tf.Tensor) -> tf.Tensor:
    return tf.slice(x, tf.cast(x[0, :2], tf.int32), [1, 1])


def in_a_loop(x: tf.Tensor) -> tf.Tensor:
    return tf.map_fn(lambda row: tf.cast(tf.cast(row, tf.int32) + 1, tf.float32), x)


@pytest.mark.parametrize(
    ("function", "operation", "problem"),
    [
        (int32_arithmetic, "Maximum", "from the host's memory"),
        (without_a_kernel, "Split", "no GPU kernel"),
        (shape_from_data, "Slice", "from the host's memory"),
        (in_a_loop, "AddV2", "from the host's memory"),
    ],
)
def test_operations_on_the_host_are_found(function, operation, problem):
    traced = tf.function(function, autograph=False).get_concrete_function(tf.TensorSpec([2, 5]))
    assert any(line.startswith(f"{operation} (") and problem in line for line in examine(traced).host)


@pytest.mark.parametrize(("policy", "most"), [("float32", 56), ("mixed_bfloat16", 67)])
def test_a_step_has_few_operations(policy, most):
    """The more, the longer it takes on a GPU, which needs microseconds to start each of them."""
    one = count_step(policy, parts=1, mode="fast")
    assert one.total() <= most
    eight = count_step(policy, parts=8, mode="exact")
    num_sums = 7  # tensors that a shard adds to: six gradients and the metrics
    slices = 3 * 8  # of examples and weights
    assert eight.total() <= 8 * one.total() + 7 * num_sums + slices
    assert eight["MatMul"] == 8 * one["MatMul"]
    assert eight["ResourceApplyAdam"] == one["ResourceApplyAdam"] == 1


@pytest.mark.parametrize(("compiler", "num_programs"), [("none", 0), ("auto", 0), ("xla", 1)])
def test_shards_are_compiled_by_xla_if_configured(compiler, num_programs):
    """Once for all shards, so that they have the same bits."""
    step = Programs(build("strategy=single", *SMALL["exact"], f"compile={compiler}")).trace_step()
    functions = step.graph.as_graph_def().library.function
    assert sum(function.attr["_XlaMustCompile"].b for function in functions) == num_programs


@pytest.mark.parametrize(
    ("overrides", "compiled"),
    [
        (["strategy=single", "reproducibility=fast"], True),
        (["strategy=single", "reproducibility=fast", "compile=xla"], True),
        (["strategy=single", "reproducibility=fast", "compile=none"], False),
        (["strategy=single", "reproducibility=exact", "compile=xla"], False),
        (["strategy=mirrored", "strategy.num_replicas=2", "reproducibility=fast", "compile=xla"], False),
    ],
)
def test_an_epoch_is_one_program_of_xla(overrides, compiled):
    """Where there is nothing to exchange, and no other number of replicas to agree with to the bit."""
    programs = trace_all(build("batch.global_size=64", *overrides))
    assert [programs[name].function_def.attr["_XlaMustCompile"].b for name in ("train", "evaluate")] == [compiled] * 2


def test_what_tensorflow_has_no_kernel_for_is_a_line(monkeypatch):
    """As an H200 said it."""
    message = (
        "Graph execution error:\n\nDetected at node gradient_tape/MaxPoolGrad defined at:\n"
        "<stack traces unavailable>\nGPU MaxPool gradient ops do not yet have a deterministic XLA implementation.\n\t"
    )
    programs = Programs(build("strategy=single", *SMALL["exact"], "reproducibility=exact", "compile=xla"))
    monkeypatch.setattr(
        programs._train, "_compiled", Mock(side_effect=tf.errors.UnimplementedError(None, None, message))
    )
    indices = programs._engine.plan.shuffled(seed=0, epoch=1)
    with pytest.raises(UserError, match=r"compile=none or reproducibility=fast: GPU MaxPool .* XLA implementation\.$"):
        programs.train_epoch(indices, learning_rates=np.ones(len(indices)))


def test_what_xla_cannot_compile_is_a_line(tmp_path):
    """Keras turns images by an operation that XLA does not have."""
    (tmp_path / "turns.py").write_text(
        "import keras\nfrom keras import layers\ndef build():\n    return keras.Sequential([keras.Input((28, 28, 1)), "
        "layers.RandomRotation(0.1), layers.Flatten(), layers.Dense(10, activation='softmax')])\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        programs = Programs(build("strategy=single", "model=keras", "model.factory=turns:build", "compile=xla"))
    indices = programs._engine.plan.shuffled(seed=0, epoch=1)
    with pytest.raises(
        UserError, match=r"choose compile=none: .*unsupported operations .*: ImageProjectiveTransformV3"
    ):
        programs.train_epoch(indices, learning_rates=np.ones(len(indices)))


def count_step(policy: str, *, parts: int, mode: str) -> Counter[str]:
    engine = build("strategy=single", f"reproducibility={mode}", f"precision={policy}", parts=parts)
    return examine(Programs(engine).trace_step()).device
