"""The compiled programs, compared step by step with the same arithmetic in plain NumPy and Keras."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from mnist_dist.config.compose import compose_config
from mnist_dist.data.splits import Split
from mnist_dist.engine.augment import create_augmentation
from mnist_dist.engine.batches import BatchPlan
from mnist_dist.engine.flat_model import FlatModel
from mnist_dist.engine.layers.position import BatchPosition
from mnist_dist.engine.optimizer import create_optimizer
from mnist_dist.engine.precision import LossScale, choose_precision
from mnist_dist.engine.programs.evaluate import EvaluateProgram
from mnist_dist.engine.programs.placement import place_split
from mnist_dist.engine.programs.state import TrainState
from mnist_dist.engine.programs.train import TrainProgram
from mnist_dist.engine.reduction import ExactSum, FastSum
from mnist_dist.engine.shards import ShardPlan
from mnist_dist.models.build import build_model
from mnist_dist.strategy.base import SingleDevice, Strategy
from mnist_dist.strategy.mirrored import Mirrored

NUM_PIXELS, NUM_CLASSES = 20, 3


def make_split(num_examples: int, seed: int = 0) -> Split:
    rng = np.random.default_rng(seed)
    labels = np.eye(NUM_CLASSES, dtype=np.float32)[rng.integers(NUM_CLASSES, size=num_examples)]
    return Split(rng.random((num_examples, NUM_PIXELS), np.float32), labels)


def make_program(
    split: Split, *overrides: str, strategy: Strategy | None = None, reduction=None, shards=None, augmentation=None
):
    strategy = strategy or SingleDevice()
    config = compose_config("model.hidden_sizes=[16]", *overrides)
    policy = choose_precision(config.precision.name, None)
    config.precision.name = policy
    model = build_model(config.model, image_shape=(4, 5), num_classes=NUM_CLASSES, seed=0)
    flat_model = FlatModel(model, policy=policy)
    state = TrainState(
        flat_model.vectors(),
        optimizer=create_optimizer(config.optimizer, flat_model.weight_kinds()),
        loss_scale=LossScale(config.precision),
        strategy=strategy,
        clip_norm=config.gradient_clip_norm,
    )
    program = TrainProgram(
        flat_model,
        state,
        split=place_split(split, strategy, dtype=flat_model.compute_dtype)._replace(
            augmentation=augmentation, label_smoothing=config.loss.label_smoothing
        ),
        shards=shards or shards_for(strategy, 16),
        reduction=(reduction or FastSum)(strategy),
        xla="shard" if config.compile == "xla" else None,
    )
    return program, state, flat_model, model


def shards_for(strategy: Strategy, batch_size: int) -> ShardPlan:
    """One shard for each replica."""
    return ShardPlan(strategy.num_replicas, -(-batch_size // strategy.num_replicas), strategy.num_replicas)


def plan_for(strategy: Strategy, num_examples: int, batch_size: int) -> BatchPlan:
    return BatchPlan(num_examples, batch_size, num_rows=shards_for(strategy, 16).num_rows)


def rates(indices: np.ndarray, rate: float) -> np.ndarray:
    return np.full(len(indices), rate)


def keras_optimizer(name: str) -> keras.optimizers.Optimizer:
    if name != "adamw":
        return {"sgd": keras.optimizers.SGD, "adam": keras.optimizers.Adam}[name](0.01)
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.004)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


@pytest.mark.parametrize("compiler", ["none", "xla"])
@pytest.mark.parametrize(
    ("optimizer", "smoothing", "clip_norm"),
    [("sgd", 0, None), ("adam", 0, None), ("adamw", 0, None), ("sgd", 0.3, None), ("sgd", 0, 0.1), ("adamw", 0.3, 0.1)],
)
def test_an_epoch_equals_plain_keras_steps(optimizer, smoothing, clip_norm, compiler):
    """70 examples in batches of 16: the last batch has 6. The losses that are told are never smoothed."""
    split = make_split(70)
    program, state, _, model = make_program(
        split,
        *(f"optimizer={optimizer}", "optimizer.learning_rate=0.01", "model.dropout=0", f"compile={compiler}"),
        *(f"loss.label_smoothing={smoothing}", f"gradient_clip_norm={clip_norm or 'null'}"),
    )
    plan = BatchPlan(70, 16)
    indices = plan.shuffled(seed=3, epoch=1)
    sums = program.run_epoch(indices, learning_rates=rates(indices, 0.01))

    reference = keras_optimizer(optimizer)
    for step, row in enumerate(indices):
        rows = row[row >= 0]
        with tf.GradientTape() as tape:
            probabilities = model(split.images[rows], training=True)
            losses = keras.losses.categorical_crossentropy(split.labels[rows], probabilities)
            loss = keras.losses.CategoricalCrossentropy(label_smoothing=smoothing)(split.labels[rows], probabilities)
        gradients = tape.gradient(loss, model.trainable_variables)
        if clip_norm is not None:
            assert tf.linalg.global_norm(gradients) > 2 * clip_norm
            gradients, _ = tf.clip_by_global_norm(gradients, clip_norm)
        reference.apply(gradients, model.trainable_variables)
        assert sums.losses[step] == pytest.approx(float(tf.reduce_sum(losses)), rel=1e-5)
        correct = np.argmax(probabilities, axis=1) == np.argmax(split.labels[rows], axis=1)
        assert sums.num_correct[step] == correct.sum()
    expected = np.concatenate([variable.numpy().ravel() for variable in model.trainable_variables])
    np.testing.assert_allclose(state.weights.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert state.global_step.numpy() == plan.steps_per_epoch


def test_same_seed_same_bits():
    weights = []
    for _ in range(2):
        program, state, *_ = make_program(make_split(70))
        for epoch in (1, 2):
            indices = BatchPlan(70, 16).shuffled(seed=0, epoch=epoch)
            program.run_epoch(indices, learning_rates=rates(indices, 0.001))
        weights.append(state.weights.numpy().tobytes())
    assert weights[0] == weights[1]


def test_dropout_differs_from_step_to_step():
    split = make_split(16)
    program, *_ = make_program(split, "optimizer=sgd")
    indices = np.repeat(BatchPlan(16, 16).in_order(), 2, axis=0)
    losses = program.run_epoch(indices, learning_rates=rates(indices, 1e-30)).losses  # the weights stay the same
    assert losses[0] != losses[1]


@pytest.mark.parametrize("choice", ["shift", "affine"])
@pytest.mark.parametrize("compiler", ["none", "xla"])
def test_images_are_changed_by_step_and_row(choice, compiler):
    """As if they had been changed before, each where it is in its global batch; two shards of 8, two steps."""
    split, shards = make_split(32), ShardPlan(2, 8, 1)
    config = compose_config(f"augment={choice}").augment
    augmentation = create_augmentation(config, (4, 5), seed=0)
    steps = [
        augmentation(split.images[16 * step :][:16], BatchPosition(*tf.constant([0, step], tf.int64)))
        for step in range(2)
    ]
    found = []
    for images, change in ((split.images, augmentation), (np.concatenate(steps), None)):
        program, state, *_ = make_program(
            Split(images, split.labels), f"compile={compiler}", shards=shards, augmentation=change
        )
        indices = BatchPlan(32, 16).in_order()
        sums = program.run_epoch(indices, learning_rates=rates(indices, 0.01))
        found.append((state.weights.numpy(), sums.losses))
    tolerance = 0 if compiler == "none" else 1e-5  # XLA joins the change with what follows
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_examples", [1, 50, 1025, 2100])
def test_evaluation_counts_every_example_once(num_examples):
    split = make_split(num_examples)
    _, _, network, model = make_program(split)
    strategy = SingleDevice()
    program = EvaluateProgram(network, strategy=strategy, split=place_split(split, strategy))
    sums = program.run([strategy.create_variable(network.get_weights())])

    probabilities = model.predict(split.images, verbose=0)
    actual, predicted = np.argmax(split.labels, axis=1), np.argmax(probabilities, axis=1)
    confusion = np.zeros((NUM_CLASSES, NUM_CLASSES), int)
    np.add.at(confusion, (actual, predicted), 1)
    np.testing.assert_array_equal(sums.confusion, confusion)
    assert sums.num_examples == num_examples
    assert sums.num_correct == (actual == predicted).sum()
    expected = keras.losses.categorical_crossentropy(split.labels, probabilities).numpy().sum(dtype=np.float64)
    assert sums.loss == pytest.approx(expected, rel=1e-5)


class CountingDevice(SingleDevice):
    """Counts the reductions in a compiled program."""

    def __init__(self):
        super().__init__()
        self.reduced = []

    def all_reduce_sum(self, bucket):
        self.reduced.append(bucket)
        return super().all_reduce_sum(bucket)


def test_one_reduction_per_step_with_gradients_and_metrics_in_it():
    strategy = CountingDevice()
    split = make_split(70)
    program, state, network, _ = make_program(split, strategy=strategy)
    indices = BatchPlan(70, 16).in_order()
    program.run_epoch(indices, learning_rates=rates(indices, 0.01))
    (bucket,) = strategy.reduced
    assert bucket.shape == [network.num_parameters + 2]
    assert bucket.dtype == tf.float32
    evaluation = EvaluateProgram(network, strategy=strategy, split=place_split(split, strategy))
    evaluation.run(state.model)
    assert len(strategy.reduced) == 2  # one more, for the whole split


def test_one_epoch_is_one_call_of_one_program():
    program, *_ = make_program(make_split(70))
    plan = BatchPlan(70, 16)
    for epoch in (1, 2, 3):
        indices = plan.shuffled(seed=0, epoch=epoch)
        program.run_epoch(indices, learning_rates=rates(indices, 0.1 / epoch))
    assert program._compiled.experimental_get_tracing_count() == 1


@pytest.fixture(params=[1, 2, 3, 7])
def mirrored(request) -> Mirrored:
    return Mirrored(num_replicas=request.param)


def test_every_example_once_per_epoch_through_the_real_path(mirrored):
    """With learning rate 1, no bias and logits independent of the weights' values, each example leaves a trace.

    Pixel i of example i is 1 and the rest are 0: in a network without hidden layers, row i of the kernel moves by the
    gradient of example i alone, divided by its batch size.
    """
    num_examples = NUM_PIXELS
    labels = np.eye(NUM_CLASSES, dtype=np.float32)[np.arange(num_examples) % NUM_CLASSES]
    split = Split(np.eye(num_examples, dtype=np.float32), labels)
    overrides = ["model.hidden_sizes=[]", "optimizer=sgd", "optimizer.learning_rate=1.0"]
    program, state, network, _ = make_program(split, *overrides, strategy=mirrored)
    before = network.get_weights()[: NUM_PIXELS * NUM_CLASSES].reshape(NUM_PIXELS, NUM_CLASSES)
    plan = plan_for(mirrored, num_examples, 8)  # 8, 8 and 4
    indices = plan.shuffled(seed=0, epoch=1)
    for row in indices:  # one step at a time from the same weights: a tiny rate, then scaled up
        program.run_epoch(row[np.newaxis], learning_rates=rates(indices[:1], 1e-3))
    after = mirrored.read(state.weights)[: NUM_PIXELS * NUM_CLASSES].reshape(NUM_PIXELS, NUM_CLASSES)
    probabilities = np.exp(before) / np.exp(before).sum(axis=1, keepdims=True)
    batch_sizes = np.empty(num_examples)
    for row in indices:
        batch_sizes[row[row >= 0]] = (row >= 0).sum()
    expected = 1e-3 * (labels - probabilities) / batch_sizes[:, np.newaxis]
    np.testing.assert_allclose(after - before, expected, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize(
    ("mirrored", "optimizer"),
    [(1, "sgd"), (2, "sgd"), (3, "sgd"), (7, "sgd"), (2, "adam"), (7, "adam")],
    indirect=["mirrored"],
)
def test_any_number_of_replicas_trains_the_same(mirrored, optimizer):
    split = make_split(70)
    overrides = [f"optimizer={optimizer}", "optimizer.learning_rate=0.01"]
    results = []
    for strategy in (SingleDevice(), mirrored):
        indices = plan_for(strategy, 70, 16).shuffled(seed=0, epoch=1)
        program, state, *_ = make_program(split, *overrides, strategy=strategy)
        sums = program.run_epoch(indices, learning_rates=rates(indices, 0.01))
        results.append((strategy.read(state.weights), sums))
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(results[1][1].losses, results[0][1].losses, rtol=1e-5)
    np.testing.assert_array_equal(results[1][1].num_correct, results[0][1].num_correct)


@pytest.mark.parametrize(
    ("mirrored", "policy", "compiler"),
    [
        *((number, "float32", "none") for number in (1, 2, 3, 7)), (2, "mixed_bfloat16", "none"),
        (7, "mixed_bfloat16", "none"), (3, "mixed_float16", "none"), (3, "float32", "xla"),
        (2, "mixed_bfloat16", "xla"),
    ],
    indirect=["mirrored"],
)  # fmt: skip
def test_exact_gives_the_same_bits_on_any_number_of_replicas(mirrored, policy, compiler):
    """Seven shards of three rows for batches of 20, so one row of padding in every batch; the last batch has 10."""
    split = make_split(70)
    indices = BatchPlan(70, 20, num_rows=21).shuffled(seed=0, epoch=1)
    results = []
    for strategy in (SingleDevice(), mirrored):
        plan = ShardPlan(7, 3, strategy.num_replicas)
        program, state, *_ = make_program(
            split,
            f"precision={policy}",
            f"compile={compiler}",
            strategy=strategy,
            shards=plan,
            reduction=lambda strategy, plan=plan: ExactSum(strategy, plan),
        )
        sums = program.run_epoch(indices, learning_rates=rates(indices, 0.01))
        vectors = [state.weights, *state.slots]
        copies = {np.stack(copy).tobytes() for copy in zip(*map(strategy.copies, vectors), strict=True)}
        assert len(copies) == 1
        results.append((copies, sums.losses.tobytes(), sums.num_correct.tobytes()))
    assert results[1] == results[0]


@pytest.mark.parametrize("mirrored", [2, 3], indirect=True)
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("compiler", ["none", "xla"])
def test_exact_with_everything_that_changes_a_gradient(mirrored, policy, compiler):
    split = make_split(70)
    indices = BatchPlan(70, 20, num_rows=21).shuffled(seed=0, epoch=1)
    weights = []
    for strategy in (SingleDevice(), mirrored):
        plan = ShardPlan(7, 3, strategy.num_replicas)
        program, state, network, _ = make_program(
            split,
            *("optimizer=adamw", "optimizer.weight_decay=0.1", "gradient_clip_norm=0.1", "loss.label_smoothing=0.1"),
            *(f"precision={policy}", f"compile={compiler}"),
            strategy=strategy,
            shards=plan,
            reduction=lambda strategy, plan=plan: ExactSum(strategy, plan),
        )
        program.run_epoch(indices, learning_rates=rates(indices, 0.01))
        assert strategy.read(state.num_updates) == len(indices)
        weights += [copy.tobytes() for copy in strategy.copies(state.weights)]
    assert len(set(weights)) == 1
    assert weights[0] != network.get_weights().tobytes()


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_the_gradient_is_clipped_as_it_is_without_the_loss_scale(policy):
    """So one step of SGD moves the weights by the learning rate times the limit."""
    program, state, network, _ = make_program(
        make_split(16), f"precision={policy}", "optimizer=sgd", "gradient_clip_norm=0.01", "model.dropout=0"
    )
    indices = BatchPlan(16, 16).in_order()
    program.run_epoch(indices, learning_rates=rates(indices, 0.5))
    assert np.linalg.norm(state.weights.numpy() - network.get_weights()) == pytest.approx(0.5 * 0.01, rel=1e-4)


def test_each_replica_has_its_own_copy_of_the_data(mirrored):
    copies = mirrored._strategy.experimental_local_results(mirrored.replicate(np.zeros(3, np.float32)))
    assert [copy.device[-5:] for copy in copies] == [device[-5:] for device in mirrored.devices()]


def test_replicas_hold_the_same_bits(mirrored):
    program, state, *_ = make_program(make_split(70), strategy=mirrored)
    indices = plan_for(mirrored, 70, 16).shuffled(seed=0, epoch=1)
    program.run_epoch(indices, learning_rates=rates(indices, 0.01))
    copies = [value.numpy().tobytes() for value in mirrored._strategy.experimental_local_results(state.weights)]
    assert len(copies) == mirrored.num_replicas
    assert len(set(copies)) == 1


@pytest.mark.parametrize("num_examples", [6, 1025])
def test_evaluation_over_replicas_counts_every_example_once(mirrored, num_examples):
    split = make_split(num_examples)
    _, _, network, _ = make_program(split)
    sums = [
        EvaluateProgram(network, strategy=strategy, split=place_split(split, strategy)).run(
            [strategy.create_variable(network.get_weights())]
        )
        for strategy in (SingleDevice(), mirrored)
    ]
    np.testing.assert_array_equal(sums[1].confusion, sums[0].confusion)
    assert sums[1].num_examples == num_examples
    assert sums[1].loss == pytest.approx(sums[0].loss, rel=1e-6)


@pytest.mark.parametrize("clipping", ["gradient_clip_norm=null", "gradient_clip_norm=0.1"])
def test_an_overflow_on_one_replica_skips_the_step_on_all(clipping):
    """Example 0, seen by one of two replicas, has large pixels and a wrong label: its gradient overflows float16."""
    strategy = Mirrored(num_replicas=2)
    split = make_split(16)
    split.images[0] = 500
    overrides = ["precision=mixed_float16", "precision.initial_loss_scale=16384", "model.dropout=0", clipping]
    program, state, network, model = make_program(split, *overrides, strategy=strategy)
    split.labels[0] = np.eye(NUM_CLASSES)[model.predict(split.images[:1], verbose=0).argmin()]
    program, state, network, _ = make_program(split, *overrides, strategy=strategy)
    indices = plan_for(strategy, 16, 8).in_order()
    sums = program.run_epoch(indices[:1], learning_rates=rates(indices[:1], 0.01))
    assert np.isfinite(sums.losses).all()  # the loss itself is fine, so training continues
    for copy in strategy._strategy.experimental_local_results(state.weights):
        np.testing.assert_array_equal(copy.numpy(), network.get_weights())
    assert strategy.read(state.loss_scale) == 8192
    assert (strategy.read(state.global_step), strategy.read(state.num_updates)) == (1, 0)
    program.run_epoch(indices[1:], learning_rates=rates(indices[1:], 0.01))
    assert np.abs(strategy.read(state.weights) - network.get_weights()).max() > 1e-3
    assert (strategy.read(state.global_step), strategy.read(state.num_updates)) == (2, 1)
    assert strategy.read(state.loss_scale) == 8192


def test_the_loss_scale_grows_after_many_good_steps():
    program, state, *_ = make_program(
        make_split(64),
        "precision=mixed_float16",
        "precision.initial_loss_scale=4",
        "precision.loss_scale_growth_steps=3",
    )
    indices = plan_for(SingleDevice(), 64, 8).in_order()
    program.run_epoch(indices, learning_rates=rates(indices, 0.01))
    assert state.loss_scale.numpy() == 16  # 8 steps: twice three
    assert state.good_steps.numpy() == 2


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_stays_near_float32(policy):
    split = make_split(70)
    indices = BatchPlan(70, 16).shuffled(seed=0, epoch=1)
    losses, weights = [], []
    for name in ("float32", policy):
        program, state, *_ = make_program(split, f"precision={name}")
        losses.append(program.run_epoch(indices, learning_rates=rates(indices, 0.01)).losses)
        weights.append(state.weights.numpy())
        assert state.weights.dtype == tf.float32
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.03)
    assert not np.array_equal(weights[0], weights[1])  # it did compute in a different precision
