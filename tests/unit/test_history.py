import math

import pytest

from mnist_dist.results.history import COLUMNS, EpochMetrics, History, from_csv, to_csv


def metrics(epoch: int, val_accuracy: float = 0.5, weights_sha256: str | None = None) -> EpochMetrics:
    return EpochMetrics(epoch, 0.1 + epoch / 3, 0.9, 0.2, val_accuracy, 0.001, 0.6, 1e5 / 3, weights_sha256)


def test_columns_are_as_documented():
    always = "epoch,loss,accuracy,val_loss,val_accuracy,learning_rate,epoch_s,images_per_s"
    assert ",".join(COLUMNS) == f"{always},weights_sha256"
    assert to_csv(History((metrics(1),))).splitlines()[0] == always


@pytest.mark.parametrize("digest", [None, "0" * 63 + "f"])
def test_csv_round_trip_is_exact(digest):
    history = History((metrics(1, weights_sha256=digest), metrics(2, weights_sha256=digest)))
    text = to_csv(history)
    assert from_csv(text) == history
    assert text.splitlines()[0].endswith(",weights_sha256") == bool(digest)


@pytest.mark.parametrize("epochs", [[2], [1, 1], [1, 3], [2, 1]])
def test_epochs_have_no_gap_or_repeat(epochs):
    with pytest.raises(ValueError, match="without a gap"):
        History(tuple(metrics(epoch) for epoch in epochs))


def test_append_takes_only_the_next_epoch():
    history = History().append(metrics(1))
    assert len(history.epochs) == 1
    with pytest.raises(ValueError, match="without a gap"):
        history.append(metrics(3))


def test_best_is_the_first_of_the_highest():
    history = History((metrics(1, 0.5), metrics(2, 0.9), metrics(3, 0.9)))
    assert history.best.epoch == 2


@pytest.mark.parametrize("text", ["", "epoch,loss\n1,2\n", to_csv(History()) + "1,2,3\n"])
def test_not_a_history(text):
    with pytest.raises(ValueError, match="expected"):
        from_csv(text)


def test_column():
    assert math.isclose(History((metrics(1), metrics(2))).column("loss")[1], 0.1 + 2 / 3)
