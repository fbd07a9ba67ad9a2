"""What reports compute: mistakes worth a picture, groups, intervals, McNemar's test, what is bit-identical."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from mnist_dist.report.comparison import Comparison, exact_mcnemar
from mnist_dist.results.history import EpochMetrics, History
from mnist_dist.results.predictions import (
    NUM_WORST,
    PER_PAIR,
    Answers,
    Mistakes,
    Predictions,
    SplitPredictions,
    find_mistakes,
)
from mnist_dist.results.sums import SplitMetrics
from mnist_dist.run.events import Event
from mnist_dist.run.record import RunRecord
from mnist_dist.run.summary import DatasetSummary, Summary, Timing

NUM_IMAGES = 400
STOPPED = (Event(kind="stopped", time=1.8e9, epoch=5, reason="asked to"),)


def create_predictions(correct: np.ndarray) -> Predictions:
    num_right = int(correct.sum())
    confusion = np.array([[num_right, len(correct) - num_right], [0, 0]])
    nothing = np.zeros(0, np.int64)
    mistakes = Mistakes(np.zeros((0, 2, 2), np.uint8), nothing, nothing, nothing, np.zeros(0, np.float32))
    return Predictions(("a", "b"), {"test": SplitPredictions(confusion, correct)}, mistakes)


def create_record(
    name: str, *, correct: int | None = 300, digests: str | None = "abc", sha256: str = "data", **keys
) -> RunRecord:
    """A run whose weights after each epoch are named by a letter."""
    config = {
        "run_dir": name,
        "seed": keys.pop("seed", 0),
        "optimizer": {"name": "adam", "learning_rate": keys.pop("rate", 0.001)},
        "trainer": {"epochs": 3},
        "console": {"tensorflow_messages": keys.pop("messages", False)},
    }
    rows = [EpochMetrics(i, 1.0, 0.5, 1.0, 0.5, 1e-3, 1.0, 100.0, letter) for i, letter in enumerate(digests or "", 1)]
    if digests is None:
        rows = [EpochMetrics(1, 1.0, 0.5, 1.0, 0.5, 1e-3, 1.0, 100.0)]
    summary = None
    right = np.arange(NUM_IMAGES) < (correct or 0)
    if correct is not None:
        split = SplitMetrics(1.0, correct / NUM_IMAGES, correct, NUM_IMAGES)
        summary = Summary(
            status="finished", dataset=DatasetSummary("npz", sha256, 1, 1, NUM_IMAGES), strategy="single",
            world_size=1, num_replicas=1, global_batch_size=1, per_replica_batch_size=1, precision="float32", seed=0,
            epochs_completed=3, train=split, val=split, test=split, avoidable_bias_percent=0.0, variance_percent=0.0,
            weights_sha256="c" * 64, timing=Timing(1.0, 1.0, 1.0, 1.0), resumed_from_epochs=(), versions={},
        )  # fmt: skip
    predictions = create_predictions(right) if summary else None
    return RunRecord(
        Path("runs", name), config, History(tuple(rows)), summary, (), is_alive=False, damage="",
        load_predictions=lambda: predictions,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("only_first", "only_second"), [(0, 0), (1, 0), (0, 7), (5, 5), (10, 25), (40, 12), (200, 260)]
)
def test_mcnemar_is_the_exact_binomial_test(only_first, only_second):
    found = exact_mcnemar(only_first, only_second)
    number = only_first + only_second
    expected = scipy.stats.binomtest(only_first, number, 0.5).pvalue if number else 1.0
    assert found.p == pytest.approx(expected, rel=1e-9)


def test_mcnemar_counts_images():
    first, second = create_record("a", correct=300), create_record("b", correct=280)
    test = Comparison.of([first, second]).mcnemar(1)
    assert (test.only_first, test.only_second) == (20, 0)
    swapped = create_predictions(np.roll(first.load_predictions().splits["test"].correct, 10))
    second = dataclasses.replace(first, load_predictions=lambda: swapped)
    test = Comparison.of([first, second]).mcnemar(1)
    assert (test.only_first, test.only_second) == (10, 10)


@pytest.mark.parametrize("change", [{"sha256": "other"}, {"correct": None}])
def test_mcnemar_needs_the_same_images_and_results(change):
    assert Comparison.of([create_record("a"), create_record("b", **change)]).mcnemar(1) is None


def test_mcnemar_needs_predictions_that_can_be_read():
    def fail():
        raise ValueError("damaged")

    damaged = dataclasses.replace(create_record("b"), load_predictions=fail)
    assert Comparison.of([create_record("a"), damaged]).mcnemar(1) is None


def test_groups_have_the_same_data():
    runs = [create_record("a", sha256="one"), create_record("b", sha256="two", seed=1)]
    assert [(group.settings, len(group.accuracies)) for group in Comparison.of(runs).groups()] == [
        ({"data": "one"}, 1),
        ({"data": "two"}, 1),
    ]
    assert Comparison.of(runs).worse(1.0) == ["b has other data than a"]


def test_results_of_a_run_that_was_trained_further_do_not_count():
    further = create_record("b", correct=390)
    further = dataclasses.replace(further, config={**further.config, "trainer": {"epochs": 9}}, events=STOPPED)
    assert further.state == "stopped"
    comparison = Comparison.of([create_record("a"), further])
    assert [group.accuracies for group in comparison.groups()] == [(300 / NUM_IMAGES,)]
    assert comparison.worse(0.0) == ["b has no result (stopped)"]


@pytest.mark.parametrize(
    ("digests", "expected"), [("abc", 3), ("ab", 2), ("abd", 2), ("xbc", 0), ("abcd", 3), (None, None), ("", None)]
)
def test_identical_epochs(digests, expected):
    comparison = Comparison.of([create_record("a"), create_record("b", digests=digests)])
    assert comparison.identical_epochs(1) == expected


def test_groups_are_everything_but_the_seed():
    runs = [
        create_record("a", seed=0, correct=300),
        create_record("b", seed=1, correct=310),
        create_record("c", seed=2, correct=308, messages=True),  # no key of the training
        create_record("d", seed=0, correct=390, rate=0.01),
        create_record("e", seed=0, correct=300),  # the same training again
        create_record("f", seed=3, correct=None),
    ]
    best, other = Comparison.of(runs).groups()
    assert (best.settings, best.accuracies) == ({"optimizer.learning_rate": "0.01"}, (390 / NUM_IMAGES,))
    assert best.half_width is None
    accuracies = np.array([300, 310, 308]) / NUM_IMAGES
    assert other.accuracies == tuple(accuracies)
    low, high = scipy.stats.t.interval(0.95, 2, loc=accuracies.mean(), scale=scipy.stats.sem(accuracies))
    assert (other.mean, other.half_width) == pytest.approx((accuracies.mean(), (high - low) / 2))


def test_only_keys_that_differ():
    comparison = Comparison.of([create_record("a"), create_record("b", rate=0.01), create_record("c", seed=4)])
    assert comparison.keys == ("seed", "optimizer.learning_rate")
    assert [tuple(row.values()) for row in comparison.differing] == [("0", "0.001"), ("0", "0.01"), ("4", "0.001")]
    assert Comparison.of([create_record("a"), create_record("b")]).keys == ()


def test_names_tell_runs_apart():
    first, second = create_record("a"), create_record("b")
    other = dataclasses.replace(first, path=Path("elsewhere/a"))
    assert Comparison.of([first, second]).names == ("a", "b")
    assert Comparison.of([first, other]).names == ("runs/a", "elsewhere/a")
    assert len(Comparison.of([first, first]).names) == 2


@pytest.mark.parametrize(
    ("tolerance", "expected"),
    [(0.0, ["b", "c", "d"]), (0.02, ["c", "d"]), (0.1, ["d"])],
)
def test_worse(tolerance, expected):
    runs = [create_record(name, correct=correct) for name, correct in zip("abcd", (300, 299, 280, None), strict=True)]
    assert [problem[0] for problem in Comparison.of(runs).worse(tolerance)] == expected


@pytest.mark.parametrize("lost", range(1, 40))
def test_a_drop_of_exactly_the_tolerance_is_not_worse(lost):
    runs = [create_record("a", correct=397), create_record("b", correct=397 - lost)]
    assert Comparison.of(runs).worse(lost / NUM_IMAGES) == []
    assert Comparison.of(runs).worse((lost - 0.5) / NUM_IMAGES) != []


def test_worse_than_a_first_run_without_result():
    runs = [create_record("a", correct=None), create_record("b")]
    assert Comparison.of(runs).worse(1.0) == ["a has no result (lost)"]


# predictions.npz


def create_answers(num_examples: int = 500, num_classes: int = 5):
    generator = np.random.default_rng(3)
    labels = generator.integers(num_classes, size=num_examples)
    predicted = np.where(
        generator.random(num_examples) < 0.5, labels, generator.integers(num_classes, size=num_examples)
    )
    probability = generator.random(num_examples).astype(np.float32)
    images = generator.integers(256, size=(num_examples, 4)) / np.float32(255)
    return Answers(predicted, probability), labels, images.astype(np.float32)


def test_mistakes_are_the_surest_of_all_and_of_each_frequent_pair():
    answers, labels, images = create_answers()
    found = find_mistakes(answers, labels=labels, images=images, image_shape=(2, 2))
    wrong = np.flatnonzero(answers.predicted != labels)
    surest = wrong[np.argsort(-answers.probability[wrong])][:NUM_WORST]
    assert set(surest) <= set(found.example) <= set(wrong)
    assert list(found.probability) == sorted(found.probability, reverse=True)
    assert np.array_equal(found.images.reshape(-1, 4), np.rint(255 * images[found.example]))
    assert np.array_equal(found.label, labels[found.example])
    pairs = list(zip(labels[wrong], answers.predicted[wrong], strict=True))
    most = max(set(pairs), key=pairs.count)
    of_pair = wrong[[pair == most for pair in pairs]]
    expected = of_pair[np.argsort(-answers.probability[of_pair])][:PER_PAIR]
    assert set(expected) <= set(found.example)


def test_no_mistakes():
    answers, _, images = create_answers()
    found = find_mistakes(answers, labels=answers.predicted, images=images, image_shape=(2, 2, 1))
    assert found.images.shape == (0, 2, 2, 1)


def test_large_images_are_few():
    answers, labels, _ = create_answers()
    images = np.zeros((500, 1024 * 1024), np.float32)
    found = find_mistakes(answers, labels=labels, images=images, image_shape=(1024, 1024))
    assert len(found.images) == 2


def test_predictions_read_back():
    answers, labels, images = create_answers(num_examples=501)
    confusion = np.zeros((5, 5), np.int64)
    np.add.at(confusion, (labels, answers.predicted), 1)
    splits = {name: SplitPredictions(confusion, answers.predicted == labels) for name in ("val", "test")}
    mistakes = find_mistakes(answers, labels=labels, images=images, image_shape=(2, 2))
    written = Predictions(("a", "<b>", "ä", "d", "e"), splits, mistakes)
    content = written.to_bytes()
    assert content == written.to_bytes()
    read = Predictions.from_bytes(content)
    assert read.class_names == written.class_names
    for name in splits:
        assert np.array_equal(read.splits[name].correct, splits[name].correct)
        assert np.array_equal(read.splits[name].confusion, confusion)
    for field in dataclasses.fields(Mistakes):
        assert np.array_equal(getattr(read.mistakes, field.name), getattr(mistakes, field.name))


@pytest.mark.parametrize("damage", [lambda content: content[:-40], lambda content: b"no archive", lambda content: b""])
def test_damaged_predictions(damage):
    with pytest.raises(ValueError):
        Predictions.from_bytes(damage(create_predictions(np.arange(8) < 5).to_bytes()))


def test_any_flipped_byte_is_a_value_error_or_harmless():
    content = create_predictions(np.arange(800) % 7 < 5).to_bytes()
    num_refused = 0
    for place in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[place] ^= 0x5A
        try:
            Predictions.from_bytes(bytes(damaged))
        except ValueError:
            num_refused += 1
    assert num_refused > len(content) / 3 / 2


def test_predictions_that_do_not_fit_each_other():
    found = create_predictions(np.arange(8) < 5)
    for other in (
        dataclasses.replace(found, class_names=("a",)),
        dataclasses.replace(found, splits={"val": found.splits["test"]}),
        dataclasses.replace(
            found, splits={"test": SplitPredictions(found.splits["test"].confusion, np.zeros(8, bool))}
        ),
        dataclasses.replace(found, mistakes=dataclasses.replace(found.mistakes, label=np.array([1]))),
        dataclasses.replace(found, mistakes=dataclasses.replace(found.mistakes, images=np.zeros((0, 4), np.uint8))),
    ):
        with pytest.raises(ValueError):
            Predictions.from_bytes(other.to_bytes())


def test_bits_take_an_eighth_of_a_byte():
    content = create_predictions(np.random.default_rng(0).random(10_000) < 0.9).to_bytes()
    assert len(content) < 10_000 / 8 + 3000


def test_a_run_of_an_earlier_version_did_what_newer_keys_mean():
    """Its configuration has no such keys; the second run has them with these values, the third with others."""
    records = [create_record(name) for name in "abc"]
    for record, schedule, smoothing in zip(records[1:], ("constant", "cosine"), (0.0, 0.1), strict=True):
        record.config.update({"learning_rate": {"schedule": schedule}, "loss": {"label_smoothing": smoothing}})
        record.config.update({"gradient_clip_norm": None, "augment": {"name": "none"}})
    assert Comparison.of(records[:2]).keys == ()
    assert set(Comparison.of(records).keys) == {"learning_rate.schedule", "loss.label_smoothing"}
