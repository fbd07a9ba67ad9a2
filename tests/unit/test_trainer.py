import numpy as np
import pytest

from mnist_dist.base.errors import TrainingFailed
from mnist_dist.engine.actions import LogEpoch
from mnist_dist.engine.batches import BatchPlan
from mnist_dist.engine.trainer import Trainer
from mnist_dist.results.sums import EpochSums, EvaluationSums

PLAN = BatchPlan(10, 4)


class FakePrograms:
    """Stands in for the compiled programs; remembers what it was asked."""

    def __init__(self, losses=(4.0, 4.0, 1.0), agree_to_stop=lambda epoch: False):
        self.losses = losses
        self.indices = []
        self.agree_to_stop = agree_to_stop

    def train_epoch(self, indices, *, learning_rates):
        assert learning_rates.tolist() == [0.5] * len(indices)
        self.indices.append(indices)
        return EpochSums(np.array(self.losses, np.float32), np.array([3, 3, 1]))

    def validate(self):
        return EvaluationSums(loss=5.0, confusion=np.array([[3, 1], [2, 4]]))

    def digest_weights(self):
        return None


def make_trainer(programs: FakePrograms, **kwargs) -> Trainer:
    return Trainer(
        programs,
        plan=PLAN,
        seed=5,
        learning_rate_at=lambda steps: np.full(len(steps), 0.5),
        **kwargs,
    )


def test_metrics_are_sums_over_all_examples():
    history = make_trainer(FakePrograms()).fit(num_epochs=2)
    row = history.epochs[1]
    assert (row.epoch, row.loss, row.accuracy) == (2, 0.9, 0.7)
    assert (row.val_loss, row.val_accuracy, row.learning_rate) == (0.5, 0.7, 0.5)
    assert row.epoch_s > 0
    assert row.images_per_s > 0


def test_every_epoch_has_its_own_plan():
    programs = FakePrograms()
    make_trainer(programs).fit(num_epochs=2)
    for epoch, indices in enumerate(programs.indices, start=1):
        np.testing.assert_array_equal(indices, PLAN.shuffled(seed=5, epoch=epoch))


def test_actions_run_between_epochs_with_all_epochs_so_far():
    seen = []
    make_trainer(FakePrograms(), actions=[lambda history: seen.append(len(history.epochs))]).fit(num_epochs=3)
    assert seen == [1, 2, 3]


@pytest.mark.parametrize(("bad", "shown"), [(np.nan, "nan"), (np.inf, "inf")])
def test_a_loss_that_is_not_a_number_stops_the_run(bad, shown):
    seen = []
    trainer = make_trainer(FakePrograms(losses=(1.0, bad, bad)), actions=[seen.append])
    with pytest.raises(TrainingFailed, match=f"became {shown} at epoch 1, step 2 of 3"):
        trainer.fit(num_epochs=2)
    assert seen == []  # nothing from the bad epoch was saved


def test_a_request_stops_after_the_epoch_and_the_rest_can_follow():
    seen = []
    checked = []
    trainer = make_trainer(
        FakePrograms(agree_to_stop=lambda epoch: checked.append(epoch) or (checked.count(2) == 1 and epoch == 2)),
        actions=[lambda history: seen.append(history)],
    )
    stopped = trainer.fit(num_epochs=4)
    assert seen[-1] == stopped
    assert [row.epoch for row in stopped.epochs] == [1, 2]
    whole = trainer.fit(num_epochs=4, history=stopped)
    assert [row.epoch for row in whole.epochs] == [1, 2, 3, 4]
    assert whole.epochs[:2] == stopped.epochs
    assert trainer.fit(num_epochs=4, history=whole) == whole


def test_enough_epochs_end_the_run_and_more_can_follow():
    checked = []
    trainer = make_trainer(FakePrograms(agree_to_stop=lambda epoch: checked.append(epoch)))
    reached = trainer.fit(num_epochs=4, is_enough=lambda history: len(history.epochs) == 2)
    assert [row.epoch for row in reached.epochs] == [1, 2]
    assert checked == [0, 1, 2]
    assert trainer.fit(num_epochs=4, history=reached, is_enough=lambda history: True) == reached
    assert checked == [0, 1, 2]  # nobody is asked, as nothing is trained
    assert len(trainer.fit(num_epochs=4, history=reached).epochs) == 4


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_request_from_before_stops_before_the_next_epoch(epoch):
    programs = FakePrograms()
    reached = make_trainer(programs).fit(num_epochs=epoch)
    checked = []
    programs.agree_to_stop = lambda number: not checked.append(number)
    trainer = make_trainer(programs)
    assert trainer.fit(num_epochs=4, history=reached) == reached
    assert checked == [epoch]
    assert len(programs.indices) == epoch


def test_log_line_has_the_recipes_format(logged):
    LogEpoch(num_epochs=150)(make_trainer(FakePrograms()).fit(num_epochs=1))
    assert logged() == [
        "Epoch 1/150 - 0.0s - loss: 0.9000 - accuracy: 0.7000 - val_loss: 0.5000 - val_accuracy: 0.7000"
    ]
