import math

import keras
import numpy as np
import pytest

from mnist_dist.base.errors import UserError
from mnist_dist.config.compose import compose_config
from mnist_dist.engine.learning_rate import LearningRate

STEPS_PER_EPOCH = 10


def rate_of(*overrides: str, base: float = 0.1, batch_factor: int = 1) -> LearningRate:
    config = compose_config(*(f"learning_rate.{text}" for text in overrides), "trainer.epochs=5").learning_rate
    return LearningRate(config, base=base, batch_factor=batch_factor, steps_per_epoch=STEPS_PER_EPOCH)


@pytest.mark.parametrize(
    ("scaling", "warmup", "factor", "expected"),
    [
        ("none", 0, 4, [0.1, 0.1, 0.1, 0.1]),
        ("linear", 0, 4, [0.4, 0.4, 0.4, 0.4]),
        ("sqrt", 0, 4, [0.2, 0.2, 0.2, 0.2]),
        ("linear", 1.5, 4, [0.2, 0.3, 0.4, 0.4]),  # three steps of warm-up, from 0.1
        ("none", 1, 4, [0.05, 0.1, 0.1, 0.1]),  # nothing to warm up from but 0
    ],
)
def test_learning_rates(scaling, warmup, factor, expected):
    config = compose_config(f"learning_rate.scaling={scaling}", f"learning_rate.warmup_epochs={warmup}").learning_rate
    rate = LearningRate(config, base=0.1, batch_factor=factor, steps_per_epoch=2)
    assert rate.at(np.arange(4)) == pytest.approx(expected)
    assert rate.at(np.arange(2, 4)) == pytest.approx(expected[2:])


def test_a_rate_that_scaling_makes_too_large():
    config = compose_config("learning_rate.scaling=linear").learning_rate
    with pytest.raises(UserError, match=r"^learning_rate.scaling=linear: raises optimizer.learning_rate=3e\+38 by "):
        LearningRate(config, base=3e38, batch_factor=4, steps_per_epoch=2)


@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize("epochs", [5, 3])
def test_cosine_is_keras(final, epochs):
    """By default over all epochs; then the rate stays what it is at the end."""
    more = [f"schedule_epochs={epochs}"] if epochs != 5 else []
    rate = rate_of("schedule=cosine", f"final_fraction={final}", *more)
    of_keras = keras.optimizers.schedules.CosineDecay(0.1, epochs * STEPS_PER_EPOCH, alpha=final)
    steps = np.arange(80)
    np.testing.assert_allclose(rate.at(steps), [float(of_keras(step)) for step in steps], rtol=1e-5, atol=1e-8)
    assert rate.at(np.array([0]))[0] == 0.1
    assert set(rate.at(np.arange(epochs * STEPS_PER_EPOCH, 80)).tolist()) == {0.1 * final}


def test_cosine_after_a_warm_up_of_a_scaled_rate():
    """The steps after the warm-up are those of Keras; within it there is nothing but the warm-up."""
    asked = ("scaling=linear", "warmup_epochs=1.5")
    rate = rate_of("schedule=cosine", *asked, batch_factor=4)
    steps = np.arange(60)
    of_keras = keras.optimizers.schedules.CosineDecay(0.4, 35)
    np.testing.assert_array_equal(rate.at(steps[:15]), rate_of(*asked, batch_factor=4).at(steps[:15]))
    assert rate.at(steps)[14] == rate.at(steps)[15] == 0.4
    expected = [float(of_keras(step)) for step in range(45)]
    np.testing.assert_allclose(rate.at(steps)[15:], expected, rtol=1e-5, atol=1e-8)


def test_one_cycle():
    """Two half cosines, as PyTorch's OneCycleLR has them, over 15 and 35 steps."""
    rate = rate_of("schedule=one_cycle", "final_fraction=0.01")

    def half_cosine(first: float, last: float, share: float) -> float:
        return last + (first - last) / 2 * (1 + math.cos(math.pi * share))

    rising = [half_cosine(0.1 / 25, 0.1, step / 15) for step in range(15)]
    falling = [half_cosine(0.1, 0.001, step / 35) for step in range(35)]
    np.testing.assert_allclose(rate.at(np.arange(55)), [*rising, *falling, *[0.001] * 5], rtol=1e-12)
    assert np.argmax(rate.at(np.arange(55))) == 15


def test_other_shares_of_one_cycle():
    rate = rate_of("schedule=one_cycle", "start_fraction=0.5", "rise_fraction=0.5", "schedule_epochs=2")
    assert rate.at(np.array([0, 5, 10, 15, 20, 90])) == pytest.approx([0.05, 0.075, 0.1, 0.05, 0, 0])


def test_steps():
    rate = rate_of("schedule=step", "step_epochs=2", "step_factor=0.5", "warmup_epochs=0.2")
    expected = [0.05, *[0.1] * 19, *[0.05] * 20, *[0.025] * 20]
    np.testing.assert_allclose(rate.at(np.arange(60)), expected, rtol=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle", "step"])
def test_a_part_of_the_steps_is_the_part_of_the_rates(schedule):
    """So a resumed run goes on as if it had not been interrupted."""
    rate = rate_of(f"schedule={schedule}", "step_epochs=1")
    whole = rate.at(np.arange(70))
    for start in (0, 10, 30, 60):
        assert rate.at(np.arange(start, start + 10)).tobytes() == whole[start : start + 10].tobytes()


def test_a_warm_up_that_rounds_to_the_whole_schedule():
    rate = rate_of("schedule=cosine", "warmup_epochs=4.99")
    assert np.isfinite(rate.at(np.arange(60))).all()
    assert rate.at(np.array([49, 50])).tolist() == [0.1, 0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "0.1"),
        (["warmup_epochs=1"], "0 to 0.1 over 10 steps"),
        (["schedule=step"], "0.1, times 0.1 every 30 epoch(s)"),
        (["schedule=cosine", "warmup_epochs=1"], "0 to 0.1 over 10 steps, by a cosine to 0 by epoch 5"),
        (["schedule=one_cycle", "schedule_epochs=4"], "0.004 by a cosine to 0.1, by a cosine to 0 by epoch 4"),
    ],
)
def test_words(overrides, words):
    assert rate_of(*overrides).describe() == words


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["schedule=one_cycle", "warmup_epochs=1"],
            "warmup_epochs=1.0: learning_rate.schedule=one_cycle has a rise of its own; leave this 0",
        ),
        (
            ["schedule=cosine", "warmup_epochs=5"],
            "warmup_epochs=5.0: must be less than the 5 epochs of learning_rate.schedule=cosine",
        ),
        (
            ["schedule=cosine", "warmup_epochs=2", "schedule_epochs=2"],
            "warmup_epochs=2.0: must be less than the 2 epochs of learning_rate.schedule=cosine",
        ),
    ],
)
def test_schedules_without_sense(overrides, line):
    with pytest.raises(UserError) as refusal:
        rate_of(*overrides)
    assert str(refusal.value) == f"learning_rate.{line}"
