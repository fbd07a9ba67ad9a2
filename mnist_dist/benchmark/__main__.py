"""Benchmark: `python -m mnist_dist.benchmark KEY=VALUE ...`. From top to bottom."""

import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from mnist_dist.base.console import Console, progress
from mnist_dist.base.errors import EXIT_FAILURE, EXIT_OK, UserError
from mnist_dist.base.files import write_atomically
from mnist_dist.base.versions import installed_versions
from mnist_dist.benchmark.config import BenchmarkConfig
from mnist_dist.benchmark.entries import Contender, default_texts, parse
from mnist_dist.benchmark.guard import Guard
from mnist_dist.benchmark.machine import Bystanders, describe_machine
from mnist_dist.benchmark.referee import MESSAGES, PROFILE, Entry, Referee, rounds
from mnist_dist.benchmark.report import (
    build_all_reduce,
    build_jobs,
    build_profiles,
    build_rows,
    build_targets,
    format_profile,
    format_table,
)
from mnist_dist.benchmark.startup import CommandFailed, check_cold, measure_startup
from mnist_dist.cli.main import run
from mnist_dist.config.compose import Command
from mnist_dist.data.load import load_dataset
from mnist_dist.data.splits import preprocess
from mnist_dist.launch.topology import Topology
from mnist_dist.run.folder import RunFolder

log = logging.getLogger("mnist_dist.benchmark")  # __name__ is __main__ when run with -m

_REPORT = "benchmark.json"


def benchmark(config: BenchmarkConfig, topology: Topology, console: Console) -> int:
    """Measure everything and write the report; returns the exit code, 1 if something could not be measured."""
    if topology.world_size > 1:
        raise UserError(f"{topology.world_size} processes were started; the benchmark starts its own")
    run_folder = RunFolder.from_config(config.run_dir)
    run_folder.check_usable()
    if (run_folder.path / _REPORT).exists():
        raise UserError(f"run_dir={run_folder.path}: holds a benchmark already; name another run_dir")
    check_cold(config.startup.cold)
    machine = describe_machine()
    texts = config.contenders if config.contenders is not None else default_texts(num_gpus=len(machine["gpus"]))
    contenders = [parse(text) for text in texts]
    if len(set(texts)) < len(texts):
        raise UserError("contenders: one is named twice")
    dataset = load_dataset(config.data)
    config = replace(config, data=replace(config.data, name=dataset.name))
    splits = preprocess(dataset, val_fraction=config.data.val_fraction, split_seed=config.data.split_seed)
    described = {"name": dataset.name, "sha256": dataset.sha256, "num_train": len(splits.train)}
    log.info("Data: %s, %s", dataset.name, splits.describe())
    del dataset, splits  # the children load their own

    run_folder.reserve()
    console.log_to(run_folder.path / "benchmark.log")
    log.info("Run folder: %s", run_folder.path)
    log.info("Machine: %s, %d cores, GPUs: %s", machine["cpu"], machine["cores"], ", ".join(machine["gpus"]) or "none")
    versions = installed_versions()
    log.info("Versions: %s", ", ".join(" ".join(pair) for pair in versions.items()))

    started = datetime.now().astimezone().isoformat(timespec="seconds")
    measured = measure(config, contenders)
    rows = build_rows(measured.entries, warmup=config.warmup_epochs)
    jobs = build_jobs(rows)
    targets = build_targets(rows, jobs, measured.startup)
    report = {
        "started": started,
        "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine,
        "versions": versions,
        "load_average": {"before": measured.bystanders.load_before, "after": measured.bystanders.load_after},
        "other_processes": measured.bystanders.busiest(),
        "dataset": described,
        "epochs": config.epochs,
        "warmup_epochs": config.warmup_epochs,
        "rows": rows,
        "jobs": jobs,
        "all_reduce": build_all_reduce(measured.entries),
        "profile": build_profiles(measured.entries),
        "startup": measured.startup,
        "targets": [target.to_dict() for target in targets],
    }
    run_folder.write_text(_REPORT, json.dumps(report, indent=2, allow_nan=False) + "\n")
    from mnist_dist.benchmark.chart import plot_benchmark  # Matplotlib must be imported with our settings

    title = f"{described['name']} on {machine['cpu']}, {machine['cores']} cores"
    write_atomically(run_folder.path / "benchmark.png", plot_benchmark(rows, title=title))
    log_report(report, rows)
    for target in targets if config.targets else ():
        log.info("%s", target)
    log.info("Results: %s (benchmark.json, benchmark.png)", run_folder.path)
    return EXIT_FAILURE if measured.has_failures else EXIT_OK


@dataclass(frozen=True)
class Measured:
    """What `measure` found."""

    entries: list[Entry]
    startup: dict[str, Any] | None
    bystanders: Bystanders
    has_failures: bool


def measure(config: BenchmarkConfig, contenders: Sequence[Contender]) -> Measured:
    """Start-up first, since later all of TensorFlow's files are in use; then the epochs, in turns.

    Contenders of one precision take turns: first those with one process, then the jobs of several.
    """
    bystanders = Bystanders()
    bystanders.look()
    with Guard() as guard, tempfile.TemporaryDirectory(prefix="mnist_dist_benchmark_") as folder:
        startup, startup_failed = None, False
        if config.startup.enabled:
            try:
                startup = measure_startup(
                    Path(folder),
                    overrides=data_overrides(config),
                    repeats=config.startup.repeats,
                    cold=config.startup.cold,
                    guard=guard,
                    look=bystanders.look,
                )
            except CommandFailed as error:
                log.warning("Start-up failed: %s", error)
                startup_failed = True
        entries: list[Entry] = []
        # All processes at once would need much memory, and waiting ones would be swapped out.
        groups: dict[tuple[str, bool], list[Contender]] = {}
        for contender in contenders:
            groups.setdefault((contender.precision, contender.processes > 1), []).append(contender)
        for number, group in enumerate(groups.values()):
            entries += run_group(config, group, folder=Path(folder) / str(number), guard=guard, look=bystanders.look)
    has_failures = startup_failed or any(entry.error is not None for entry in entries)
    return Measured(entries, startup, bystanders, has_failures=has_failures)


def run_group(
    config: BenchmarkConfig, contenders: Sequence[Contender], *, folder: Path, guard: Guard, look: Callable[[], None]
) -> list[Entry]:
    """Let these contenders run in turns; `look` is called after each round."""
    folder.mkdir()
    with Referee(folder, data=config.data, timeout_s=config.timeout_s, guard=guard) as referee:
        entries = [start(referee, contender) for contender in contenders]
        with progress("rounds") as show:
            for number in rounds(referee, entries, warmup=config.warmup_epochs, epochs=config.epochs):
                look()
                show(number, config.warmup_epochs + config.epochs)
        # Once per launcher: only the sizes matter, not how the training reduces.
        jobs = {entry.contender.launcher: entry for entry in reversed(entries) if entry.is_running}
        for entry in jobs.values():
            if MESSAGES in entry.parts:
                referee.let_run(entry, MESSAGES)
        for entry in entries:
            if config.profile and entry.is_running and PROFILE in entry.parts:
                referee.let_run(entry, PROFILE)
        look()
    return entries


def start(referee: Referee, contender: Contender) -> Entry:
    """Start a contender, and log it, since it takes some seconds."""
    log.info("Starting %s, %s", contender.name, contender.precision)
    return referee.start(contender)


def data_overrides(config: BenchmarkConfig) -> list[str]:
    """The command line that gives a training the same data."""
    data = config.data
    values = {"val_fraction": data.val_fraction, "split_seed": data.split_seed}
    quoted = {"path": data.path, "cache_dir": data.cache_dir, "keras_home": data.keras_home}
    texts = {key: "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'" for key, value in quoted.items() if value}
    return [f"data={data.name}", *(f"data.{key}={value}" for key, value in {**values, **texts}.items())]


def log_report(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Log the tables."""
    for line in format_table([dict(row) for row in rows]):
        log.info("%s", line)
    log.info("* the fastest Keras; /keras: ratio to Keras as published, /best: to it at its best, /floor: to the floor")
    log.info("GPU op.: operations that a GPU would run for a step, examined without one")
    for row in rows:
        threads = [row["facts"].get(f"{kind}_op_threads") for kind in ("intra", "inter")]
        if row["part"] == "epoch" and row["status"] == "ok" and "intra_op_threads" in row["facts"]:
            log.info("Threads of %s, %s: %s per operation, %s operations in parallel (0: the default)", row["name"],
                     row["precision"], *threads)  # fmt: skip
    for job in report["jobs"]:
        log.info(
            "%s, %s: epoch %.3f s / (computing %.3f s + all-reduces %.3f s) = %.2f",
            *(job[key] for key in ("name", "precision", "epoch_s", "compute_s", "all_reduces_s", "ratio")),
        )
    for name in ("warm", "cold"):
        if report["startup"] and name in report["startup"]:
            times = report["startup"][name]
            log.info(
                "Start-up, %s file cache: %.2f s to the first epoch, import tensorflow %.2f s, ratio %.2f; "
                "first epoch %.2f s longer than the second",
                name,
                *(times[key] for key in ("median_to_first_epoch_s", "median_bare_import_s", "ratio")),
                times["first_minus_second_epoch_s"],
            )
    log_profiles(report["profile"])
    load = report["load_average"]
    log.info("Load average before %.2f, after %.2f (including our own load)", load["before"], load["after"])
    for process in report["other_processes"]:
        log.info("Also ran: %.1f s of CPU time by %s (pid %d)", process["cpu_s"], process["command"], process["pid"])


def log_profiles(profiles: Sequence[Mapping[str, Any]]) -> None:
    """Log where the time of a step goes."""
    for profile in profiles:
        log.info(
            "Profile of %s, %s: time of %d threads; a step took %.2f ms while traced, %.2f ms before",
            *(profile[key] for key in ("name", "precision", "threads", "step_ms", "untraced_step_ms")),
        )
        for line in format_profile(profile):
            log.info("%s", line)
    if profiles:
        log.info("executor: in TensorFlow's executor, with operations too short to be traced; idle: all other time")


def main() -> None:
    """The console script."""
    run(Command("benchmark", BenchmarkConfig), benchmark)


if __name__ == "__main__":
    main()
