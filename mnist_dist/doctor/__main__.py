"""Look for what is wrong with an environment: `python -m mnist_dist.doctor KEY=VALUE ...`, with the keys of `train`."""

import logging

from mnist_dist.base.console import Console, show_table
from mnist_dist.base.errors import EXIT_FAILURE, EXIT_OK
from mnist_dist.cli.main import run
from mnist_dist.config.compose import Command
from mnist_dist.doctor.config import DoctorConfig
from mnist_dist.doctor.meeting import Gathered, Meeting, NobodyToReportTo
from mnist_dist.doctor.merge import Row, merge
from mnist_dist.doctor.sources import Sources
from mnist_dist.doctor.table import build_table, summarize, to_json, verdict
from mnist_dist.launch.rendezvous import Rendezvous
from mnist_dist.launch.topology import Topology

log = logging.getLogger("mnist_dist.doctor")  # __name__ is __main__ when run with -m

DOCTOR = Command("doctor", DoctorConfig)


def doctor(config: DoctorConfig, topology: Topology, console: Console) -> int:
    """Examine all processes of the job and print one table; returns the exit code, 1 if there are errors."""

    def conclude(gathered: Gathered) -> int:
        processes = gathered.processes
        rows = [Row(processes.name, processes.status, processes.found, processes.fix), *merge(gathered.reports)]
        if config.json:
            print(to_json(rows, gathered.reports), flush=True)
        else:
            show_table(build_table(rows), summarize(rows))
        return EXIT_FAILURE if verdict(rows) == "error" else EXIT_OK

    with Rendezvous(topology, timeout_s=config.strategy.start_timeout_s) as rendezvous:
        try:
            return Meeting(config, topology, Sources.of_this_process(), rendezvous).hold(conclude)
        except NobodyToReportTo as error:
            log.error("error: %s", error)
            return EXIT_FAILURE


def main() -> None:
    """The console script."""
    run(DOCTOR, doctor)


if __name__ == "__main__":
    main()
