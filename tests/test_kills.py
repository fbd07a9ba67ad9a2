"""Runs that are killed at any moment end as if nothing had happened; `soak.py` is the killer."""

import pytest
import soak
from jobs import HOROVOD, MIRRORED, SINGLE, horovodrun
from soak import STAGES, Scenario

ALL = list(STAGES)


@pytest.fixture(scope="module")
def args(small_npz):
    return soak.training_args(small_npz)


@pytest.fixture(scope="module")
def expected(args, tmp_path_factory) -> soak.Result:
    return soak.run_undisturbed(args, tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.mark.parametrize(
    ("scenario", "stages", "seed"),
    [
        (Scenario((SINGLE,)), ALL, 4),
        (Scenario((MIRRORED,)), ALL, 22),
        (Scenario((HOROVOD,)), ALL, 10),
        (Scenario((HOROVOD,), one_rank=True), ["start-up", "tracing", "epoch", "save", "results"], 0),
        (Scenario((HOROVOD, SINGLE, MIRRORED)), ["epoch", "save"], 0),
    ],
    ids=lambda value: str(value) if isinstance(value, Scenario) else "",
)
def test_kills(scenario, stages, seed, args, expected, tmp_path, record_property):
    """31 in all. Those in the middle of a file's writing are certain to be there, since the file waits for them."""
    if HOROVOD in scenario.jobs:
        horovodrun()
    kills, _ = soak.run_round(scenario, stages, seed=seed, args=args, expected=expected, folder=tmp_path / "run")
    print(*kills, soak.describe(kills), sep="\n")
    record_property("kills", [str(made) for made in kills])
    assert len(kills) == len(stages)
    certain = {"config", "history", "save", "results"} & set(stages)
    assert certain <= {made.stage for made in kills}
    if not scenario.one_rank:
        assert any(".ckpt." in (made.temporary or "") for made in kills)
