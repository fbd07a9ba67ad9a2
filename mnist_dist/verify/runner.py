"""Leads all ranks through the checks: every rank measures, rank 0 judges, writes down, and says how to go on."""

import copy
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from mnist_dist.base.errors import TrainingFailed, UserError
from mnist_dist.launch.control import OutOfStep, Trouble
from mnist_dist.verify.checks.base import Check, Detector, Evidence, Finding, names_of
from mnist_dist.verify.context import Context
from mnist_dist.verify.report import CHECK_NAMES, EXPECTED_S, CheckResult, RankFacts, Suspect

log = logging.getLogger("mnist_dist.verify")

_BAD = ("fail",)


class Runner:
    """Runs checks in order; the results are on rank 0."""

    def __init__(
        self,
        checks: Sequence[Check],
        ranks: Sequence[RankFacts],
        *,
        wanted: Sequence[str] = CHECK_NAMES,
        show: Callable[[float, float], None],
    ) -> None:
        """Create it.

        Args:
            checks: may grow while they run, once TensorFlow has started.
            ranks: where the ranks run.
            wanted: the names of all checks that will run.
            show: called with how many of the expected seconds are over, and how many there are.
        """
        self.checks = checks
        self._wanted = {*wanted, *(check.name for check in checks)}
        self.results: list[CheckResult] = []
        self.blind: list[str] = []
        """Detectors that missed a fault put into their own input."""
        self._ranks = ranks
        self._show = show
        self._statuses: dict[str, str] = {}
        self._running: tuple[Check, float] | None = None
        self._stopped = ""
        self._devices: list[list[str]] = []

    def run(self, context: Context) -> None:
        """Run all of them; the same on every rank."""
        for check in self.checks:
            self._show(*self._progress())
            if reason := self._why_not(check, context):
                self._note(check, Finding("skipped", reason), seconds=0.0)
            else:
                self._run_one(check, context)

    @property
    def is_running(self) -> bool:
        """Whether a check has begun."""
        return self._running is not None

    def _progress(self) -> tuple[float, float]:
        """Expected seconds of the checks that are done, and of all."""
        done = {result.name for result in self.results}
        return sum(EXPECTED_S[name] for name in self._wanted & done), sum(EXPECTED_S[name] for name in self._wanted)

    def end_early(self, trouble: Trouble) -> None:
        """Note trouble in the running check, and skip the others; on rank 0."""
        assert self._running is not None
        check, started = self._running
        blamed = dict.fromkeys(trouble.ranks, trouble.text)
        self._note(check, Finding("fail", trouble.text, blamed), seconds=time.perf_counter() - started)
        for other in self.checks:
            if other.name not in self._statuses:
                self._note(other, Finding("skipped", f"{check.name} ended the job"), seconds=0.0)

    def _why_not(self, check: Check, context: Context) -> str:
        if self._stopped:
            return self._stopped
        if lost := [name for name in check.needs if self._statuses.get(name) in _BAD]:
            return f"it builds on {lost[0]}, which failed"
        if not context.is_started and check.name not in ("environment", "identity"):
            return "the devices were not started"
        return check.why_not(context) if context.is_started else ""

    def _run_one(self, check: Check, context: Context) -> None:
        started = time.perf_counter()
        self._running = check, started
        context.control.enter(check.name, deadline_s=context.asked.deadline_s)
        evidence: Evidence
        error, breaks = "", False
        try:
            evidence = check.measure(context)
        except OutOfStep:
            evidence = {}  # another rank says why
        except (TrainingFailed, UserError) as found:
            evidence, error = {}, str(found)
        except Exception as found:  # the backend's own errors are of many kinds; each is a finding
            log.debug("%s", check.name, exc_info=True)
            evidence, error, breaks = {}, f"{type(found).__name__}: {' '.join(str(found).split())[:300]}", True
        self._devices = context.devices
        handed_in = {"evidence": evidence, "error": error, "breaks": breaks}

        def decide(values: list[dict[str, Any]]) -> dict[str, Any]:
            finding = self._judge(check, values)
            self._note(check, finding, seconds=time.perf_counter() - started)
            return {"status": finding.status, "breaks": any(value["breaks"] for value in values)}

        reply = context.control.settle(handed_in, decide, is_last=True, failure=error)
        self._statuses[check.name] = reply["status"]
        if reply["breaks"]:
            # After a failed collective the next one would not meet the same call on the other ranks.
            self._stopped = f"{check.name} broke off"

    def _judge(self, check: Check, values: Sequence[dict[str, Any]]) -> Finding:
        failed = {rank: value["error"] for rank, value in enumerate(values) if value["error"]}
        if failed:
            same = len(set(failed.values())) == 1 and len(failed) == len(values) > 1
            text = next(iter(failed.values()))
            return Finding("fail", f"{'all ranks' if same else names_of(failed)}: {text}", {} if same else failed)
        evidence = [value["evidence"] for value in values]
        try:
            finding = check.judge(evidence)
            if isinstance(check, Detector) and finding.status in ("pass", "info", "inconclusive"):
                self._judge_the_judge(check, evidence)
        except Exception as error:  # the other ranks wait for an answer
            log.exception("%s cannot be judged", check.name)
            return Finding("fail", f"cannot be judged, please report it: {type(error).__name__}: {error}")
        return finding

    def _judge_the_judge(self, check: Detector, evidence: Sequence[Evidence]) -> None:
        """Put a fault into a copy of good evidence: would it have been found, and the right rank?"""
        spoiled = copy.deepcopy(list(evidence))
        rank = check.spoil(spoiled)
        finding = check.judge(spoiled)
        if finding.status not in ("fail", "degraded"):
            self.blind.append(f"{check.name} does not see a fault put into its evidence")
        elif rank is not None and rank not in {self._place_of(number, finding)[0] for number in finding.blamed}:
            self.blind.append(f"{check.name} does not blame rank {rank} for a fault put into its evidence")

    def _place_of(self, number: int, finding: Finding) -> tuple[int, str]:
        """The rank and the device of what a finding blames; all devices of a rank that is blamed as a whole."""
        devices = self._devices or [[""] for _ in self._ranks]
        rank, local = number, None
        if finding.of == "replica":
            rank, local = [(rank, local) for rank, own in enumerate(devices) for local in range(len(own))][number]
        names = self._ranks[rank].gpus or devices[rank]
        return rank, " ".join(names) if local is None or local >= len(names) else names[local]

    def _note(self, check: Check, finding: Finding, *, seconds: float) -> None:
        self._statuses[check.name] = finding.status
        suspects = []
        for number, evidence in sorted(finding.blamed.items()):
            rank, device = self._place_of(number, finding)
            suspects.append(Suspect(rank, self._ranks[rank].host, check.name, evidence, device))
        result = CheckResult(
            check.number,
            check.name,
            finding.status,
            finding.summary,
            round(seconds, 2),
            tuple(suspects),
            finding.details,
        )
        self.results.append(result)
        done_s, all_s = self._progress()
        left = f" (about {all_s - done_s:.0f} s left)" if done_s < all_s else ""
        log.info("%s%s", describe(result), left)


def describe(result: CheckResult) -> str:
    """A result in one line."""
    return f"{result.number:>3} {result.name:<18} {result.status:<12} {result.seconds:>6.1f} s  {result.summary}"


def judge_detectors(runner: Runner) -> CheckResult:
    """Check 1, from what the others found out about themselves."""
    tried = [result.name for result in runner.results if result.status in ("pass", "inconclusive")]
    if runner.blind:
        return CheckResult(1, "detectors", "fail", "; ".join(runner.blind))
    if not tried:
        return CheckResult(1, "detectors", "skipped", "no check had good evidence to put a fault into")
    summary = f"a fault put into the evidence of each of {len(tried)} checks would have been found"
    return CheckResult(1, "detectors", "pass", summary, details={"checks": tried})
