"""The ranks of a job bring their findings together, without a collective and whoever is missing.

They meet three times: to learn who is here, within `strategy.start_timeout_s`; to hand in their findings; and, once
rank 0 has printed the table, to end with its exit code, since launchers end all processes when one fails.
"""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from mnist_dist.base.errors import EXIT_FAILURE, UserError
from mnist_dist.doctor.checks.network import check_ports
from mnist_dist.doctor.checks.storage import check_shared_lock
from mnist_dist.doctor.config import DoctorConfig
from mnist_dist.doctor.examine import examine
from mnist_dist.doctor.finding import Finding, RankReport
from mnist_dist.doctor.probe import start_child
from mnist_dist.doctor.sources import Sources
from mnist_dist.launch.reception import FIRST_TOPIC, RankTaken
from mnist_dist.launch.rendezvous import Rendezvous
from mnist_dist.launch.topology import Topology
from mnist_dist.run.folder import RunFolder

_SLACK_S = 15.0  # a rank that has just been killed a probe still has to report
_LOCK_S, _END_S = 5.0, 10.0


class NobodyToReportTo(RuntimeError):
    """There is no rank 0; the message says why."""


class Gathered(NamedTuple):
    """What has come together on a rank."""

    reports: list[RankReport]
    """Of the ranks that have reported, by rank."""
    processes: Finding
    """Who has not."""


@dataclass
class Meeting:
    """This rank's part."""

    config: DoctorConfig
    topology: Topology
    sources: Sources
    rendezvous: Rendezvous

    def hold(self, conclude: Callable[[Gathered], int]) -> int:
        """Examine this process, and let rank 0 `conclude`; the exit code that it returns is that of every rank.

        Raises:
            RankTaken: another process has this one's rank.
            NobodyToReportTo: rank 0 has not come, or has ended.
        """
        with ThreadPoolExecutor(1) as background, self._lock() as lock:
            # The probes take their time while the ranks meet.
            examined = background.submit(self._examine)
            problem = self._hold_own_port()
            hello = json.dumps({"host": socket.gethostname(), "lock": lock})
            hellos, problem = self._meet(hello, problem)
            clock_s = time.time()
            if 0 not in hellos:
                raise NobodyToReportTo(
                    f"{self.topology.describe_rank(0)}, which prints the table, did not come within "
                    f"{self.config.strategy.start_timeout_s:.0f} s; start all {self.topology.world_size} processes, "
                    "and check that they can reach each other"
                )
            findings = [check_ports(self.sources.proc, self.topology, problem=problem)]
            findings += self._try_lock(json.loads(hellos[0])["lock"])
            own = RankReport(self.topology.rank, socket.gethostname(), (*examined.result(), *findings), clock_s=clock_s)
            gathered = self._gather(own, hellos)
        return self._end_together(conclude, gathered)

    def _examine(self) -> list[Finding]:
        return examine(self.config, self.topology, timeout_s=self.config.timeout_s, sources=self.sources)

    def _hold_own_port(self) -> str | None:
        """Hold this rank's port of TF_CONFIG, as a training does; returns why that is not possible."""
        try:
            self.rendezvous.hold_own_port()
        except RankTaken:
            raise
        except UserError as error:
            return str(error)
        return None

    def _meet(self, hello: str, problem: str | None) -> tuple[dict[int, str], str | None]:
        """Learn who is here; a rank 0 that cannot listen is alone."""
        if problem is not None and self.topology.is_chief:
            return {0: hello}, problem
        try:
            return self.rendezvous.collect(hello, topic=FIRST_TOPIC), problem
        except RankTaken:
            raise
        except UserError as error:
            if not self.topology.is_chief:
                raise NobodyToReportTo(str(error)) from error
            return {0: hello}, str(error)

    def _gather(self, own: RankReport, hellos: dict[int, str]) -> Gathered:
        """Exchange the findings of the ranks that are here."""
        texts = {own.rank: own.to_json()}
        if len(hellos) > 1:
            timeout_s = self.config.timeout_s + _SLACK_S
            try:
                texts = self.rendezvous.collect(own.to_json(), topic="findings", ranks=[*hellos], timeout_s=timeout_s)
            except UserError as error:
                raise NobodyToReportTo(str(error)) from error
        reports = [RankReport.from_json(text) for _, text in sorted(texts.items())]
        hosts = {rank: str(json.loads(text)["host"]) for rank, text in hellos.items()}
        return Gathered(reports, self._check_processes({report.rank for report in reports}, hosts))

    def _check_processes(self, reported: set[int], hosts: dict[int, str]) -> Finding:
        topology, name = self.topology, "processes"
        silent = [rank for rank in range(topology.world_size) if rank not in reported]
        if silent:
            names = topology.describe_ranks(silent, hosts=hosts)
            found = f"{names} never reported; {len(reported)} of {topology.world_size} did"
            fix = (
                "look at the node (scontrol show node NODE, ssh NODE), start all processes, and let a firewall pass "
                "the ports; if it is only slow: strategy.start_timeout_s=600"
            )
            return Finding(name, "error", found, fix)
        where = f" on {len(set(hosts.values()))} host(s)" if topology.world_size > 1 else ""
        launcher = topology.launcher.name
        started = "one, without a launcher" if launcher == "none" else f"{topology.world_size}{where}, by {launcher}"
        return Finding(name, "ok", started)

    def _end_together(self, conclude: Callable[[Gathered], int], gathered: Gathered) -> int:
        present = [report.rank for report in gathered.reports]
        code = conclude(gathered) if self.topology.is_chief else EXIT_FAILURE
        if len(present) == 1:
            return code
        # Rank 0 may be held up by whoever reads the table.
        timeout_s = _END_S if self.topology.is_chief else 6 * _END_S
        with contextlib.suppress(UserError):
            texts = self.rendezvous.collect(str(code), topic="end", ranks=present, timeout_s=timeout_s)
            return int(texts.get(0, code))
        return code

    @contextlib.contextmanager
    def _lock(self) -> Iterator[str | None]:
        """On rank 0 of several: hold a lock in the run folder while the block runs; yields its path, or None."""
        if self.topology.world_size == 1 or not self.topology.is_chief:
            yield None
            return
        bound_s = self.config.strategy.start_timeout_s + self.config.timeout_s + 2 * _SLACK_S
        holder = start_child(
            "shared_lock", self._run_folder(), None, variables=self.sources.variables, timeout_s=bound_s
        )
        soon = replace(holder, timeout_s=min(_LOCK_S, self.config.timeout_s))
        try:
            yield soon.answer("held")
        finally:
            holder.end()

    def _try_lock(self, lock: str | None) -> list[Finding]:
        """On the other ranks: whether rank 0's lock is seen here."""
        if lock is None or self.topology.is_chief:
            return []
        timeout_s = min(_LOCK_S, self.config.timeout_s)
        variables = self.sources.variables
        outcome = start_child(
            "shared_lock", self._run_folder(), lock, variables=variables, timeout_s=timeout_s
        ).outcome()
        return [check_shared_lock(outcome.answers.get("lock"), outcome, self.topology)]

    def _run_folder(self) -> Path:
        return RunFolder.from_config(self.config.run_dir).path.absolute()
