"""Runs that are killed at any moment end as if nothing had happened; `soak.py` does the killing."""

import pytest
from support import soak
from support.job import HOROVOD, MIRRORED, SINGLE
from support.launchers import horovodrun
from support.runs import result_of
from support.soak import STAGES, Scenario

# 24 kills, with the seeds that draw their moments.
CASES = {
    Scenario((SINGLE,)): (STAGES, 4),
    Scenario((MIRRORED,)): (("tracing", "epoch", "save", "results"), 22),
    Scenario((HOROVOD,)): (("import", "tracing", "epoch", "save", "results"), 10),
    Scenario((HOROVOD,), "kill one rank"): (("start-up", "tracing", "epoch", "save", "results"), 0),
    Scenario((HOROVOD, SINGLE, MIRRORED)): (("epoch", "save"), 0),
}


@pytest.mark.parametrize("scenario", CASES, ids=str)
def test_kills(scenario, args, uninterrupted, tmp_path, record_property):
    if HOROVOD in scenario.jobs:
        horovodrun()
    stages, seed = CASES[scenario]
    expected = result_of(uninterrupted)
    kills = list(soak.run_round(scenario, stages, seed=seed, args=args, expected=expected, folder=tmp_path / "run"))
    assert not any(made.hangs for made in kills)
    print(*kills, soak.describe(kills), sep="\n")
    record_property("kills", "; ".join(map(str, kills)))
    assert len(kills) == len(stages)
    # Writing a file waits for its kill, so these are certain to happen.
    assert {"config", "history", "save", "results"} & set(stages) <= {made.stage for made in kills}
    if scenario.fault == "kill":
        assert any(".ckpt." in (made.temporary or "") for made in kills)
