"""A device computes wrongly in the middle of a run."""

import pytest
from support.hooks import HOOKS
from support.job import job_name

from mnist_dist.results.history import from_csv


@pytest.mark.parametrize(
    ("job", "what", "mode", "named"),
    [
        (("horovod", 3), "slot", "exact", "replica 1 of 3 did not have"),
        (("mirrored", 3), "weights", "exact", "replica 1 of 3 did not have"),
    ],
    ids=lambda value: job_name(value) if isinstance(value, tuple) else None,
)
def test_a_run_stops_at_a_flipped_bit(job, what, mode, named, run_job, small_npz, tmp_path):
    env = {"PROBE_DIR": str(tmp_path), "PROBE_FLIP": f"2:1:{what}"}
    arguments = [
        "data=npz", f"data.path={small_npz}", "trainer.epochs=3", f"reproducibility={mode}", f"run_dir={tmp_path}/run",
    ]  # fmt: skip
    results = run_job(
        job, *arguments, script=[HOOKS / "probe.py"], env=env
    )  # fails after five minutes if a process hangs
    for result in results:
        assert result.returncode == 1, result.stderr + result.stdout
    output = "".join(result.stdout + result.stderr for result in results)
    assert f"error: after epoch 2 {named}" in output
    assert [row.epoch for row in from_csv((tmp_path / "run" / "history.csv").read_text()).epochs] == [1]
    assert not (tmp_path / "run" / "summary.json").exists()
