"""Bands: their arithmetic, when there are any, what is stored, and real trainings with and without a fault."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from scipy import stats
from support import CHECKOUT

from mnist_dist.config.compare import IMPLIED, training_keys
from mnist_dist.config.compose import compose_config
from mnist_dist.config.train import TrainConfig
from mnist_dist.data.load import load_dataset
from mnist_dist.data.splits import Splits, preprocess
from mnist_dist.launch.topology import Topology
from mnist_dist.results.history import EpochMetrics, History
from mnist_dist.verify import bands
from mnist_dist.verify.bands import (
    NUMBERS,
    Band,
    Bands,
    Trial,
    find_bands,
    load_stored,
    logit_of_count,
    measure,
    recipe_keys,
    subtract,
)

BAND = Band("loss_3", mean=-1.5, std=0.1, num_seeds=64)
RECIPE = training_keys(asdict(compose_config("data=mnist", "reproducibility=exact")))
DIGESTS = {entry["dataset"]: entry["sha256"] for entry in load_stored()["bands"]}
CASES = [
    (name, *kind)
    for name in ("digits", "mnist")
    for kind in (("float32", False), ("mixed_bfloat16", False), ("mixed_bfloat16", True))
]


def judge(*values: float) -> bands.Judgement:
    return Bands((BAND,)).judge([{"loss_3": value, "another": 0.0} for value in values])


@pytest.mark.parametrize("num_seeds", [2, 8, 64, 128])
@pytest.mark.parametrize("num_runs", [1, 3])
def test_the_interval_is_that_of_students_t(num_seeds, num_runs):
    expected = stats.t.ppf(0.99995, num_seeds - 1) * 0.5 * math.sqrt(1 / num_runs + 1 / num_seeds)
    assert Band("x", 7.0, 0.5, num_seeds).half_width(num_runs) == pytest.approx(expected, rel=1e-9)


def test_the_interval_of_64_seeds():
    """By hand: t(63) is 4.15455 at 0.99995."""
    assert Band("x", 7.0, 2.0, 64).half_width() == pytest.approx(4.15455 * 2 * math.sqrt(65 / 64), rel=1e-5)
    assert Band("x", 7.0, 2.0, 64).half_width(3) == pytest.approx(4.15455 * 2 * math.sqrt(67 / 192), rel=1e-5)


@pytest.mark.parametrize("num_runs", [1, 3])
def test_the_interval_covers_new_trainings_as_often_as_it_says(num_runs, monkeypatch):
    """For few seeds, where a confidence interval, or one without the seeds' own uncertainty, would be far off."""
    monkeypatch.setattr(bands, "ALPHA", 0.05)
    generator = np.random.default_rng(0)
    seeds, runs = generator.standard_normal((20_000, 5)), generator.standard_normal((20_000, num_runs))
    widths = Band("x", 0.0, 1.0, 5).half_width(num_runs) * seeds.std(axis=1, ddof=1)
    inside = np.abs(runs.mean(axis=1) - seeds.mean(axis=1)) <= widths
    assert inside.mean() == pytest.approx(0.95, abs=0.006)


@pytest.mark.parametrize(
    ("distance", "outcome"),
    [(0, "inside"), (0.99, "inside"), (1.02, "needs_more"), (1.48, "needs_more"), (1.52, "outside"), (100, "outside")],
)
@pytest.mark.parametrize("sign", [-1, 1])
def test_one_training_is_judged_by_its_distance(distance, outcome, sign):
    bound = BAND.half_width()
    found = judge(-1.5 + sign * distance * bound)
    assert found.outcome == outcome
    (number,) = found.numbers
    assert (number.name, number.mean, number.outcome) == ("loss_3", -1.5, outcome)
    assert (number.low, number.high) == pytest.approx((-1.5 - bound, -1.5 + bound))
    assert number.deviations == pytest.approx(sign * distance * bound / 0.1)


def test_three_trainings_are_judged_by_their_mean():
    bound = BAND.half_width(3)
    first = -1.5 + 1.2 * BAND.half_width()  # needs more
    assert judge(first).outcome == "needs_more"
    assert judge(first, -1.5, -1.5).outcome == "inside"
    assert judge(first, first, first).outcome == "outside"  # by the narrower interval of a mean, and decided
    just = -1.5 + 1.01 * bound
    assert judge(just, just, just).outcome == "outside"
    assert judge(just).outcome == "inside"
    assert judge(just, just, just).numbers[0].value == pytest.approx(just)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_outside(value):
    found = judge(value)
    assert found.outcome == "outside"
    assert "training loss of epoch 3" in found.describe()


def test_the_worst_number_decides():
    judge_both = Bands((BAND, replace(BAND, name="val_loss_3"))).judge
    near, far = -1.5 + 1.2 * BAND.half_width(), 5.0
    assert judge_both([{"loss_3": -1.5, "val_loss_3": -1.5}]).outcome == "inside"
    assert judge_both([{"loss_3": -1.5, "val_loss_3": near}]).outcome == "needs_more"
    found = judge_both([{"loss_3": far, "val_loss_3": near}])
    assert found.outcome == "outside"
    assert found.describe().startswith("training loss of epoch 3: 148.4132, outside 0.14")
    with pytest.raises(ValueError, match="nothing"):
        judge_both([])


def make_trial(**last: float) -> Trial:
    row = EpochMetrics(1, 0.7, 0.8, 0.25, 0.9, 0.001, 1.0, 1.0)
    epochs = (row, replace(row, epoch=2, loss=0.3), replace(row, **{"epoch": 3, "loss": 0.2, **last}))
    losses = np.full(30, 40.0)
    losses[0], losses[24], losses[25], losses[-1] = 1e6, 64.0, 50.0, 1e6
    return Trial((losses,) * 3, batch_size=20, history=History(epochs), num_val=100)


def test_numbers_are_transformed():
    numbers = measure(make_trial(val_accuracy=0.93))
    assert numbers.keys() == NUMBERS.keys()
    assert numbers["early_loss"] == pytest.approx(math.log((23 * 40 + 64) / (24 * 20)))  # not the first step
    assert numbers["later_loss"] == pytest.approx(math.log((3 * 40 + 50) / (4 * 20)))  # nor the last one
    assert [numbers[f"loss_{epoch}"] for epoch in (1, 2, 3)] == pytest.approx([math.log(x) for x in (0.7, 0.3, 0.2)])
    assert numbers["val_loss_3"] == pytest.approx(math.log(0.25))
    assert numbers["val_correct"] == pytest.approx(math.log(93.5 / 7.5))
    assert [logit_of_count(count, 9) for count in (0, 9)] == pytest.approx([-math.log(19), math.log(19)])
    assert math.isnan(measure(make_trial(loss=math.inf))["loss_3"])
    assert NUMBERS["val_correct"].show(numbers["val_correct"]) == "92.57 %"
    other = measure(make_trial(loss=0.4))
    assert subtract(other, numbers)["loss_3"] == pytest.approx(math.log(2))
    assert NUMBERS["loss_3"].show_difference(math.log(2)) == "x 2.0000"


@pytest.mark.parametrize(("name", "precision", "paired"), CASES)
def test_there_are_bands_for_the_recipe(name, precision, paired):
    found = find_bands(name, DIGESTS[name], precision, RECIPE, paired=paired)
    assert isinstance(found, Bands)
    assert found.paired == paired
    names = {band.name for band in found.bands}
    assert {"loss_3", "val_loss_3"} <= names
    assert "val_correct" not in names  # stored, but not used
    assert {band.num_seeds for band in found.bands} == {128}


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=77", "reproducibility=fast", "compile=xla", "batch.num_shards=3", "data=digits"],
        ["trainer.epochs=3", "threads.inter_op=2", "strategy=mirrored", "run_dir=elsewhere", "precision=float32"],
    ],
)
def test_some_keys_do_not_matter(overrides):
    keys = training_keys(asdict(compose_config(*overrides)))
    assert isinstance(find_bands("mnist", DIGESTS["mnist"], "float32", keys), Bands)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["optimizer.learning_rate=0.002"], "optimizer.learning_rate=0.002 rather than 0.001"),
        (["model.dropout=0.3", "batch.global_size=256"], "batch.global_size=256 rather than 512, model.dropout=0.3"),
        (["data.split_seed=1"], "data.split_seed=1 rather than 0"),
        (["optimizer=sgd"], "optimizer.name=sgd rather than adam"),
        (["batch.scaling=weak"], "batch.scaling=weak rather than strong"),
        (["gradient_clip_norm=1"], "gradient_clip_norm=1.0 rather than None"),
        (["learning_rate.schedule=cosine"], "learning_rate.schedule=cosine rather than constant"),
        (["model=cnn"], "model.name=cnn rather than mlp"),
        (["augment=shift"], "augment.max_pixels=2 rather than none, augment.name=shift rather than none"),
    ],
)
def test_another_recipe_has_no_bands(overrides, reason):
    keys = training_keys(asdict(compose_config(*overrides)))
    found = find_bands("mnist", DIGESTS["mnist"], "float32", keys)
    assert isinstance(found, str)
    assert found.startswith("the bands are for the default recipe only: ")
    assert reason in found


def test_other_data_and_precisions_have_no_bands():
    reason = "there are bands for digits and mnist only, and these images (mnist) are neither of them: digest ffffffff"
    assert find_bands("mnist", "f" * 64, "float32", RECIPE) == f"{reason}ffff"
    assert "these images (npz) are neither of them" in find_bands("npz", "f" * 64, "float32", RECIPE)
    assert (
        find_bands("mnist", DIGESTS["mnist"], "mixed_float16", RECIPE)
        == "there are no bands for precision=mixed_float16"
    )
    assert "float32 against float32" in find_bands("mnist", DIGESTS["mnist"], "float32", RECIPE, paired=True)


def test_the_stored_bands_are_of_the_default_recipe():
    assert recipe_keys({**IMPLIED, **load_stored()["recipe"]}) == recipe_keys(RECIPE)
    assert (load_stored()["alpha"], load_stored()["epochs"]) == (bands.ALPHA, bands.EPOCHS)
    assert {"tensorflow", "keras", "numpy", "python"} <= load_stored()["versions"].keys()


def test_the_stored_bands_are_complete():
    entries = load_stored()["bands"]
    assert [(entry["dataset"], entry["precision"], entry["paired"]) for entry in entries] == sorted(
        CASES, key=lambda case: (case[2], case[1], case[0])
    )
    for entry in entries:
        assert entry["num_seeds"] >= 64
        hold_out, seeds = entry["hold_out"], range(entry["first_seed"], entry["first_seed"] + entry["num_seeds"])
        assert (hold_out["num_seeds"], hold_out["passed"]) == (16, 16)
        assert hold_out["first_seed"] not in seeds
        assert sum(entry["leave_one_out"].values()) == entry["num_seeds"]
        assert entry["leave_one_out"].get("outside", 0) == 0


def test_the_stored_means_are_those_of_the_stored_values():
    for entry in load_stored()["bands"]:
        for number in entry["numbers"].values():
            if number["used"]:
                assert len(number["values"]) == entry["num_seeds"]
                assert np.mean(number["values"]) == pytest.approx(number["mean"], abs=1e-6)
                assert np.std(number["values"], ddof=1) == pytest.approx(number["std"], abs=1e-6)


def test_the_used_numbers_see_what_they_must():
    """In the table of effects, as built: see docs/bands.md for the rule."""
    for entry in load_stored()["bands"]:
        names = list(entry["numbers"])
        assert names == list(NUMBERS)
        for fault in ("rate_x2", "rate_half", "dropout_0", "dropout_0.6", "labels_1", "lost_tenth"):
            moves = dict(zip(names, entry["effects"][fault]["moves"], strict=True))
            used = [name for name in names if entry["numbers"][name]["used"] and NUMBERS[name].stage == "training"]
            assert min(abs(moves[name]) for name in used) >= 8
            assert entry["effects"][fault]["outcomes"] == {"outside": 8}
        for variant in ("fast", "xla"):
            assert entry["effects"][variant]["outcomes"] == {"inside": 8}


def test_the_page_has_the_stored_numbers(monkeypatch):
    monkeypatch.syspath_prepend(CHECKOUT / "scripts" / "bands")
    import page

    text = page.PAGE.read_text()
    assert page.render(text, load_stored()) == text, "run: python scripts/bands/page.py"


def train(config: TrainConfig, splits: Splits) -> dict[str, float]:
    from mnist_dist.engine.build import assemble
    from mnist_dist.strategy.base import SingleDevice
    from mnist_dist.verify.trial import run_trial

    return measure(run_trial(assemble(config, SingleDevice(), splits, topology=Topology())))


@pytest.fixture(scope="module", params=["digits", "mnist"])
def ready(request):
    """A function that trains with some keys changed, and the digest of the data."""
    overrides = [f"data={request.param}", "reproducibility=exact", "compile=none"]
    if request.param == "mnist":
        overrides.append(f"data.path={request.getfixturevalue('mnist_path')}")
    config = compose_config(*overrides, "precision=float32")
    dataset = load_dataset(config.data)
    splits = preprocess(dataset, val_fraction=config.data.val_fraction, split_seed=config.data.split_seed)
    return dataset, lambda *more: train(compose_config(*overrides, *more), splits)


def test_a_real_training_is_inside_and_its_faults_are_outside(ready):
    dataset, train_with = ready
    found = find_bands(dataset.name, dataset.sha256, "float32", RECIPE)
    assert isinstance(found, Bands), found
    correct = train_with("precision=float32")
    assert found.judge([correct]).outcome == "inside"
    for fault in ("optimizer.learning_rate=0.002", "model.dropout=0.2"):
        assert found.judge([train_with("precision=float32", fault)]).outcome == "outside", fault
    paired = find_bands(dataset.name, dataset.sha256, "mixed_bfloat16", RECIPE, paired=True)
    assert isinstance(paired, Bands), paired
    mixed = train_with("precision=mixed_bfloat16")
    assert paired.judge([subtract(mixed, correct)]).outcome == "inside"
    # Another seed is no pair.
    other = train_with("precision=mixed_bfloat16", "seed=1")
    assert paired.judge([subtract(other, correct)]).outcome == "outside"
