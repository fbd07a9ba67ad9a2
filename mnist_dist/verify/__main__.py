"""Verify: `python -m mnist_dist.verify KEY=VALUE ...`: does this cluster train correctly? From top to bottom."""

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any

from mnist_dist.base.console import Console, progress
from mnist_dist.base.errors import EXIT_FAILURE, EXIT_OK, EnvironmentFailed, EnvironmentProblem, UserError
from mnist_dist.base.versions import installed_versions
from mnist_dist.benchmark.machine import describe_machine
from mnist_dist.cli.main import run
from mnist_dist.config.compose import Command
from mnist_dist.data.dataset import ImageDataset
from mnist_dist.data.load import load_dataset
from mnist_dist.launch.control import Control, Trouble
from mnist_dist.launch.gpus import own_uuids
from mnist_dist.launch.rendezvous import Rendezvous
from mnist_dist.launch.stop import StopRequest
from mnist_dist.launch.topology import Topology
from mnist_dist.run.folder import RunFolder
from mnist_dist.verify.config import VerifyConfig
from mnist_dist.verify.context import Context, node_name
from mnist_dist.verify.report import CHECK_NAMES, CheckResult, RankFacts, Report, Verdict, judge
from mnist_dist.verify.runner import Runner, describe, judge_detectors

log = logging.getLogger("mnist_dist.verify")  # __name__ is __main__ when run with -m

VERIFY = Command("verify", VerifyConfig)
_FILES = ("verify.json", "verify.html", "suspects.txt", "verify.log")


class Verification:
    """One verification on one rank, and on rank 0 its report."""

    def __init__(self, config: VerifyConfig, dataset: ImageDataset, run_folder: RunFolder) -> None:
        self.config, self.dataset, self.run_folder = config, dataset, run_folder
        self.context: Context | None = None
        self.runner: Runner | None = None
        self.ranks: list[RankFacts] = []
        self._started = datetime.now().astimezone().isoformat(timespec="seconds")
        self._start_s = time.perf_counter()

    def so_far(self) -> tuple[list[CheckResult], list[RankFacts], dict[str, Any]]:
        """Results, ranks and configuration."""
        assert self.runner is not None and self.context is not None
        return self.runner.results, self.ranks, asdict(self.context.config)

    def finish(self) -> int:
        """Write the report; returns the exit code."""
        assert self.runner is not None and self.context is not None
        results, wanted = [*self.runner.results], self.config.checks or CHECK_NAMES
        if "detectors" in wanted:
            results.append(judge_detectors(self.runner))
            log.info("%s", describe(results[-1]))
        done = {result.name for result in results}
        for number, name in enumerate(CHECK_NAMES):
            if name not in done:
                why = "the devices were not started" if name in wanted else "not asked for"
                results.append(CheckResult(number, name, "skipped", why))
        results.sort(key=lambda result: result.number)
        context = self.context
        configuration = {key: value for key, value in asdict(context.config).items() if key != "run_dir"}
        report = Report(
            verdict=judge(results),
            started=self._started,
            seconds=round(time.perf_counter() - self._start_s, 2),
            command=" ".join(["python -m mnist_dist.verify", *sys.argv[1:]]),
            strategy=context.strategy.name if context.is_started else self.config.strategy.name,
            num_replicas=context.strategy.num_replicas if context.is_started else 0,
            dataset={"name": self.dataset.name, "sha256": self.dataset.sha256, "num_train": len(self.dataset.x_train)},
            configuration=configuration,
            versions=installed_versions(),
            ranks=tuple(self.ranks),
            checks=tuple(results),
        )
        write(report, self.run_folder)
        return exit_code(report.verdict, strict=self.config.strict)

    def end_early(self, trouble: Trouble) -> int:
        """Report that the ranks cannot go on together, since one is gone or hangs; returns the exit code."""
        assert self.runner is not None
        self.runner.end_early(trouble)
        return self.finish()


def verify(config: VerifyConfig, topology: Topology, console: Console) -> int:
    """Check everything, write the report, and return the exit code: 1 for FAIL."""
    run_folder = RunFolder.from_config(config.run_dir, is_writer=topology.is_chief)
    if (run_folder.path / "verify.json").exists():
        raise UserError(f"run_dir={run_folder.path}: holds a verification already; name another run_dir")
    run_folder.check_usable(files=_FILES, folders=())
    dataset = load_dataset(config.data)
    config = replace(config, data=replace(config.data, name=dataset.name))
    if topology.is_chief:
        run_folder.reserve()
        console.log_to(run_folder.path / "verify.log")
    log.info("Run folder: %s", run_folder.path)

    verification = Verification(config, dataset, run_folder)
    control = Control(topology, on_trouble=verification.end_early)
    with (
        StopRequest(tell_others=control.tell_why, has_others=topology.world_size > 1),
        Rendezvous(topology, timeout_s=config.strategy.start_timeout_s) as rendezvous,
        progress("verify") as show,
    ):
        rendezvous.hold_own_port()
        control.start(meet(rendezvous, control))
        facts = [RankFacts(**one) for one in control.settle(describe_rank(topology), list)]
        context = Context(config, dataset, rendezvous=rendezvous, control=control, folder=run_folder.path)
        verification.ranks, verification.context = facts, context
        from mnist_dist.verify.checks.all import choose_checks

        checks = choose_checks(config, start=lambda context: context.start(console), so_far=verification.so_far)
        verification.runner = Runner(checks, facts, show=lambda done, total: show(round(done), round(total)))
        verification.runner.run(context)
        code: int = control.settle(None, lambda _: verification.finish())
        control.leave()
        return code


def meet(rendezvous: Rendezvous, control: Control) -> str:
    """Rank 0's address of the control line; raises EnvironmentFailed for a rank that does not come.

    That is no wrong usage (exit code 2) here: it is what is being verified.
    """
    try:
        address: str = json.loads(rendezvous.exchange(json.dumps(control.address))[0])
    except EnvironmentProblem as error:
        raise EnvironmentFailed(str(error)) from error
    return address


def describe_rank(topology: Topology) -> dict[str, object]:
    """Where this rank runs; see `RankFacts`."""
    facts = RankFacts(
        rank=topology.rank,
        host=node_name(topology),
        devices=(),
        gpus=tuple(own_uuids(topology)),
        cpu=describe_machine()["cpu"],
        cores=len(os.sched_getaffinity(0)),
    )
    return asdict(facts)


def write(report: Report, run_folder: RunFolder) -> None:
    """Write all files, and log the verdict."""
    from mnist_dist.verify.page import build_page  # with Matplotlib, which must be imported with our settings

    hosts = sorted({suspect.host for suspect in report.suspects})
    run_folder.write_text("suspects.txt", "".join(f"{host}\n" for host in hosts))
    run_folder.write_text("verify.json", report.to_json())  # a verdict that can be read is complete but for the page
    run_folder.write_text("verify.html", build_page(report))
    for suspect in report.suspects:
        log.info("Suspect: rank %d on %s %s(%s): %s", suspect.rank, suspect.host,
                 f"{suspect.device} " if suspect.device else "", suspect.check, suspect.evidence)  # fmt: skip
    log.info("%s", summarize(report))
    log.info("Results: %s (verify.json, verify.html, suspects.txt)", run_folder.path)


def summarize(report: Report) -> str:
    """The verdict in one line: first what could not be judged."""
    kinds = {"inconclusive": "", "skipped": "not asked for"}
    counts = {
        status: [check.name for check in report.checks if check.status == status and check.summary != usual]
        for status, usual in kinds.items()
    }
    unsure = "".join(f"{len(names)} {status} ({', '.join(names)}); " for status, names in counts.items() if names)
    bad = [check.name for check in report.checks if check.status in ("fail", "degraded")]
    return f"{report.verdict}: {unsure}{', '.join(bad) if bad else 'no fault found'}, {report.seconds:.0f} s"


def exit_code(verdict: Verdict, *, strict: bool) -> int:
    """1 for FAIL, and with `strict` for DEGRADED."""
    bad: Sequence[Verdict] = ("FAIL", "DEGRADED") if strict else ("FAIL",)
    return EXIT_FAILURE if verdict in bad else EXIT_OK


def main() -> None:
    """The console script."""
    run(VERIFY, verify)


if __name__ == "__main__":
    main()
