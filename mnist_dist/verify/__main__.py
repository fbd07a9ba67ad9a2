"""Verify: `python -m mnist_dist.verify KEY=VALUE ...`: does this cluster train correctly? From top to bottom."""

import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime
from typing import NamedTuple

from mnist_dist.base.console import Console, progress
from mnist_dist.base.errors import EXIT_FAILURE, EXIT_OK, EnvironmentProblem, UserError
from mnist_dist.base.versions import installed_versions
from mnist_dist.benchmark.machine import describe_machine
from mnist_dist.cli.main import run
from mnist_dist.config.compose import Command
from mnist_dist.data.dataset import ImageDataset
from mnist_dist.data.load import load_dataset
from mnist_dist.data.splits import check_val_fraction
from mnist_dist.launch.control import Control, Trouble
from mnist_dist.launch.gpus import own_uuids
from mnist_dist.launch.reception import FIRST_TOPIC
from mnist_dist.launch.rendezvous import Rendezvous
from mnist_dist.launch.stop import StopRequest
from mnist_dist.launch.topology import Topology
from mnist_dist.run.folder import RunFolder
from mnist_dist.verify.checks.base import Evidence
from mnist_dist.verify.checks.reference import Own, compare, load_reports
from mnist_dist.verify.config import VerifyConfig
from mnist_dist.verify.context import Context
from mnist_dist.verify.report import CHECK_NAMES, CheckResult, RankFacts, Report, Suspect, Verdict, judge
from mnist_dist.verify.runner import Runner, describe, judge_detectors

log = logging.getLogger("mnist_dist.verify")  # __name__ is __main__ when run with -m

VERIFY = Command("verify", VerifyConfig)
NOT_ASKED_FOR = "not asked for"
_FILES = ("verify.json", "verify.html", "suspects.txt", "verify.log")


class Verification:
    """One verification on one rank, and on rank 0 its report."""

    dataset: ImageDataset

    def __init__(self, config: VerifyConfig, run_folder: RunFolder) -> None:
        self.config, self.run_folder = config, run_folder
        self.references: list[tuple[str, Report]] = []
        self.context: Context | None = None
        self.runner: Runner | None = None
        self.ranks: list[RankFacts] = []
        self._started = datetime.now().astimezone().isoformat(timespec="seconds")
        self._start_s = time.perf_counter()

    def reference(self) -> Evidence:
        """This job's times so far, and those of the references."""
        assert self.runner is not None and self.context is not None
        own = Own(self.runner.results, self.ranks, asdict(self.context.config), self.context.shares_cores)
        return compare(own, self.references)

    def finish(self) -> int:
        """Write the report; returns the exit code."""
        assert self.runner is not None
        results = [*self.runner.results]
        if "detectors" in self._wanted:
            results.append(judge_detectors(self.runner))
            log.info("%s", describe(results[-1]))
        return self._report(results, "the devices were not started")

    def refuse(self, missing: Sequence[int], topology: Topology, *, waited_s: float) -> int:
        """Report that ranks never came; returns the exit code."""
        suspects = tuple(
            Suspect(rank, topology.host_of(rank), "environment", f"it did not come within {waited_s:.0f} s")
            for rank in missing
        )
        text = f"{topology.describe_ranks(missing)} of {topology.world_size} did not come within {waited_s:.0f} s"
        result = CheckResult(0, "environment", "fail", text, waited_s, suspects)
        log.info("%s", describe(result))
        return self._report([result], "not all ranks came")

    @property
    def _wanted(self) -> Sequence[str]:
        return self.config.checks or CHECK_NAMES

    def _report(self, results: list[CheckResult], why_skipped: str) -> int:
        done = {result.name for result in results}
        for number, name in enumerate(CHECK_NAMES):
            if name not in done:
                why = why_skipped if name in self._wanted else NOT_ASKED_FOR
                results.append(CheckResult(number, name, "skipped", why))
        results.sort(key=lambda result: result.number)
        context, config = self.context, self.config
        started = context is not None and context.is_started
        report = Report(
            verdict=judge(results),
            started=self._started,
            seconds=round(time.perf_counter() - self._start_s, 2),
            command=" ".join(["python -m mnist_dist.verify", *sys.argv[1:]]),
            strategy=context.strategy.name if context and started else config.strategy.name,
            num_replicas=context.strategy.num_replicas if context and started else 0,
            dataset={"name": self.dataset.name, "sha256": self.dataset.sha256, "num_train": len(self.dataset.x_train)},
            configuration=asdict(context.config if context else config),
            versions=installed_versions(),
            ranks=tuple(
                replace(facts, devices=tuple(context.devices[facts.rank])) if context and started else facts
                for facts in self.ranks
            ),
            checks=tuple(results),
        )
        write(report, self.run_folder)
        return exit_code(report.verdict, strict=config.strict)

    def end_early(self, trouble: Trouble) -> int:
        """Report that the ranks cannot go on together, since one is gone or hangs; returns the exit code."""
        if self.runner is not None and self.runner.is_running:
            self.runner.end_early(trouble)
            return self.finish()
        hosts = {facts.rank: facts.host for facts in self.ranks}
        suspects = [Suspect(rank, hosts.get(rank, ""), "environment", trouble.text) for rank in trouble.ranks]
        result = CheckResult(0, "environment", "fail", trouble.text, suspects=tuple(suspects))
        log.info("%s", describe(result))
        return self._report([result], "the job ended before")


def verify(config: VerifyConfig, topology: Topology, console: Console) -> int:
    """Check everything, write the report, and return the exit code: 1 for FAIL."""
    run_folder = RunFolder.from_config(config.run_dir, is_writer=topology.is_chief)
    verification = Verification(config, run_folder)
    control = Control(topology, on_trouble=verification.end_early)
    with (
        StopRequest(tell_others=control.tell_why, has_others=topology.world_size > 1),
        Rendezvous(topology, timeout_s=config.strategy.start_timeout_s) as rendezvous,
        progress("verify") as show,
    ):
        rendezvous.hold_own_port()
        problem = read_input(verification, topology)
        came = meet(rendezvous, Greeting(control.address, str(problem or "")))
        if problem is not None:
            raise problem
        dataset = verification.dataset
        if topology.is_chief:
            run_folder.reserve()
        console.log_to(run_folder.path / "verify.log")
        log.info("Run folder: %s", run_folder.path)
        if missing := [rank for rank in range(topology.world_size) if rank not in came]:
            waited_s = config.strategy.start_timeout_s
            return verification.refuse(missing, topology, waited_s=waited_s) if topology.is_chief else EXIT_FAILURE
        control.start(came[0].address)
        facts = [RankFacts(**one) for one in control.settle(describe_rank(topology), list)]
        context = Context(verification.config, dataset, rendezvous=rendezvous, control=control, folder=run_folder.path)
        verification.ranks, verification.context = facts, context
        from mnist_dist.verify.checks.all import choose_checks

        checks = choose_checks(
            verification.config, start=lambda context: context.start(console), reference=verification.reference
        )
        verification.runner = Runner(
            checks,
            facts,
            wanted=config.checks or CHECK_NAMES,
            show=lambda done, total: show(round(done), round(total)),
        )
        verification.runner.run(context)
        code: int = control.settle(None, lambda _: verification.finish())
        control.leave()
        return code


class Greeting(NamedTuple):
    """What a rank hands in when all meet."""

    address: str
    """On rank 0, that of the control line."""
    problem: str
    """Why the rank cannot take part; empty if it can."""


def read_input(verification: "Verification", topology: Topology) -> UserError | None:
    """Read what the configuration names, on this rank; returns what is wrong with it."""
    config, run_folder = verification.config, verification.run_folder
    try:
        if topology.is_chief:
            if (run_folder.path / "verify.json").exists():
                raise UserError(f"run_dir={run_folder.path}: holds a verification already; name another run_dir")
            run_folder.check_usable(files=_FILES, folders=())
            verification.references = load_reports(config.reference) if config.reference else []
        verification.dataset = load_dataset(config.data)
        check_val_fraction(len(verification.dataset.x_train), config.data.val_fraction)
        config.augment.check_image_shape(verification.dataset.x_train.shape[1:])
        verification.config = replace(config, data=replace(config.data, name=verification.dataset.name))
    except UserError as error:
        return error
    return None


def meet(rendezvous: Rendezvous, own: Greeting) -> dict[int, Greeting]:
    """The greetings of the ranks that have come in time.

    Raises:
        UserError: rank 0 is not among them, or another rank cannot take part.
    """
    texts = rendezvous.collect(json.dumps(own), topic=FIRST_TOPIC)
    came = {rank: Greeting(*json.loads(text)) for rank, text in texts.items()}
    if 0 not in came:
        raise EnvironmentProblem(f"{rendezvous.topology.describe_rank(0)} did not come, and only it gives a verdict")
    for rank, other in came.items():
        if other.problem and not own.problem:
            raise UserError(f"rank {rank} cannot take part: {other.problem}")
    return came


def describe_rank(topology: Topology) -> dict[str, object]:
    """Where this rank runs; see `RankFacts`."""
    machine = describe_machine()
    facts = RankFacts(
        rank=topology.rank,
        host=topology.node_name(),
        devices=(),
        gpus=tuple(own_uuids(topology)),
        cpu=machine["cpu"],
        cores=machine["cores"],
        gpu=", ".join(sorted({*machine["gpus"]})),
    )
    return asdict(facts)


def write(report: Report, run_folder: RunFolder) -> None:
    """Write all files, and log the verdict."""
    from mnist_dist.verify.page import build_page  # with Matplotlib, which must be imported with our settings

    hosts = sorted({suspect.host for suspect in report.suspects if suspect.host})
    run_folder.write_text("suspects.txt", "".join(f"{host}\n" for host in hosts))
    run_folder.write_text("verify.json", report.to_json())  # a verdict that can be read is complete but for the page
    try:
        run_folder.write_text("verify.html", build_page(report))
    except Exception:  # the verdict stands, whatever is wrong with its picture
        log.exception("verify.html could not be made, please report it")
    for suspect in report.suspects:
        log.info("Suspect: rank %d on %s %s(%s): %s", suspect.rank, suspect.host,
                 f"{suspect.device} " if suspect.device else "", suspect.check, suspect.evidence)  # fmt: skip
    log.info("%s", summarize(report))
    log.info("Results: %s (verify.json, verify.html, suspects.txt)", run_folder.path)


def summarize(report: Report) -> str:
    """The verdict in one line: first what could not be judged."""
    kinds = {"inconclusive": "", "skipped": NOT_ASKED_FOR}
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
