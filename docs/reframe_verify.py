"""A ReFrame test: does this cluster train correctly, and as fast as before? How to run it: docs/verify.md."""

import json
from pathlib import Path
from typing import Any

import reframe as rfm
import reframe.utility.sanity as sn
from reframe.core.builtins import run_after, run_before, sanity_function, variable

CHECKOUT = Path(__file__).resolve().parent.parent


@rfm.simple_test
class VerifyTraining(rfm.RunOnlyRegressionTest):
    """Runs `python -m mnist_dist.verify`: sanity is its verdict, performance its bandwidth and images/s."""

    python = variable(str, value=str(CHECKOUT / ".venv/bin/python"))
    """The one that has the package."""
    strategy = variable(str, value="auto")
    """As for training; it decides how many tasks there are (slurm/README.md)."""
    options = variable(str, value="")
    """Further keys, as they are typed in a shell."""
    earlier = variable(str, value="")
    """A `verify.json` of this system when it was well; bandwidth and images per second may be a tenth below it."""

    descr = "Does this cluster train correctly, and as fast as before?"
    valid_systems = ["*"]
    valid_prog_environs = ["*"]
    sourcesdir = None
    time_limit = "10m"
    keep_files = ["verify"]

    @run_after("init")
    def compose_command(self) -> None:
        """The run folder is ReFrame's own, and new in each run."""
        self.executable = self.python
        self.executable_opts = [
            *("-m", "mnist_dist.verify", f"strategy={self.strategy}", "run_dir=verify", self.options)
        ]
        if self.earlier:
            numbers = read_numbers(json.loads(Path(self.earlier).read_text()))
            self.reference = {"*": {name: (value, -0.1, None, unit) for name, (value, unit) in numbers.items()}}

    @run_before("run")
    def set_launcher(self) -> None:
        """As slurm/verify.sh does: no MPI, and time for rank 0 to say which process was lost."""
        if self.job.launcher.registered_name == "srun":
            self.job.launcher.options = ["--mpi=none", "--distribution=block", "--kill-on-bad-exit=0", "--wait=90"]

    @sanity_function
    def trains_correctly(self) -> Any:
        """DEGRADED is none of sanity's business: the performance tells."""
        file = Path(self.stagedir) / "verify" / "verify.json"
        sn.evaluate(sn.assert_true(file.is_file(), f"verify ended without a report: see {self.stderr}"))
        self.report = json.loads(file.read_text())
        failed = [
            f"{check['name']}: {check['summary']}" for check in self.report["checks"] if check["status"] == "fail"
        ]
        hosts = sorted({suspect["host"] for check in self.report["checks"] for suspect in check["suspects"]})
        where = f" (suspects: {', '.join(hosts)})" if hosts else ""
        return sn.assert_ne(self.report["verdict"], "FAIL", "; ".join(failed) + where)

    @run_before("performance")
    def choose_numbers(self) -> None:
        """Those that were measured: one replica has neither."""
        self.perf_variables = {
            name: sn.make_performance_function(sn.defer(value), unit)
            for name, (value, unit) in read_numbers(self.report).items()
        }


def read_numbers(report: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """The speeds in a report, with their units."""
    details = {check["name"]: check["details"] for check in report["checks"]}
    numbers = {}
    speeds = [
        transfer["bus_gb_per_s"]
        for transfer in details["collectives"].get("transfers", [])
        if transfer["collective"] == "all_reduce" and report["num_replicas"] > 1
    ]
    if speeds:
        numbers["all_reduce"] = (max(speeds), "GB/s")
    for point in details["scaling"].get("points", []):
        if point["kind"] == "strong" and point["replicas"] == report["num_replicas"]:
            numbers["training"] = (point["images_per_s"], "images/s")
    return numbers
