"""All checks of one process. The probes run side by side, so that it takes as long as the slowest of them."""

import contextlib
import platform
import socket
from collections.abc import Mapping

from mnist_dist import __version__
from mnist_dist.config.model import KerasConfig
from mnist_dist.config.train import TrainConfig
from mnist_dist.doctor.checks.choices import check_choices, check_configuration
from mnist_dist.doctor.checks.gpus import QUERY, check_cuda, check_driver, check_shares
from mnist_dist.doctor.checks.machine import (
    check_cores,
    check_memory,
    check_open_files,
    check_processor,
    check_shm,
)
from mnist_dist.doctor.checks.network import check_interfaces, check_names, job_hosts
from mnist_dist.doctor.checks.own_model import check_own_model
from mnist_dist.doctor.checks.slurm import check_slurm
from mnist_dist.doctor.checks.software import (
    check_code,
    check_horovod,
    check_packages,
    check_python,
    check_tensorflow,
    check_variables,
    code_digest,
    installed_packages,
)
from mnist_dist.doctor.checks.storage import check_dataset, check_folder, check_pretrained
from mnist_dist.doctor.finding import Finding
from mnist_dist.doctor.probe import Probe, start_child, start_program
from mnist_dist.doctor.sources import Sources
from mnist_dist.launch.topology import HorovodRun, Topology

# TensorFlow says which libraries it does not find only if it is asked to.
_TALKATIVE = {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "dso_loader=1"}
# A trial takes no memory of a GPU, which another process may be using.
_WITHOUT_GPUS = {"CUDA_VISIBLE_DEVICES": "-1"}


def examine(
    config: TrainConfig, topology: Topology, *, timeout_s: float = 30.0, sources: Sources | None = None
) -> list[Finding]:
    """All findings of this process, in the order of the table.

    Args:
        config: of the training.
        topology: of this process.
        timeout_s: after which probes are killed; it takes little longer than that at most.
        sources: where to look, by default at this machine.
    """
    sources = sources or Sources.of_this_process()
    probes = _start_probes(config, topology, sources, timeout_s)
    findings = [
        check_python(platform.python_version()),
        *check_packages(packages := installed_packages()),
        check_code(__version__, code_digest()),
        check_variables(sources.settings),
        check_configuration(config),
        check_cores(topology, sources),
        check_memory(topology, sources),
        check_open_files(topology),
    ]
    outcomes = {name: probe.outcome() for name, probe in probes.items()}
    devices = outcomes["devices"]
    driver, gpus = check_driver(outcomes.get("nvidia-smi"), sources.dev)
    choices = check_choices(config, devices)
    chosen = devices.answers.get("choices", {})
    needs_horovod = chosen.get("needs_horovod", isinstance(topology.launcher, HorovodRun))
    findings += [
        check_shm(sources.dev, num_gpus=len(gpus), local_size=topology.local_size),
        check_processor(sources.proc, precision=_precision_on_cpu(chosen)),
        driver,
        check_shares(gpus, topology, sources.settings),
        check_tensorflow(devices),
        check_cuda(gpus, topology, devices),
        check_horovod(packages, devices, needed=needs_horovod, num_gpus=len(gpus)),
        *choices,
        check_dataset(config.data, outcomes["dataset"]),
        *check_pretrained(config.model),
    ]
    if isinstance(config.model, KerasConfig):
        mode = str(chosen.get("reproducibility", ""))
        findings.append(check_own_model(config.model, outcomes["own_model"], mode=mode))
    own = socket.gethostname()
    findings += [
        check_names(outcomes["network"], topology, own=own),
        check_interfaces(outcomes["network"], topology, sources.settings, own=own),
    ]
    if topology.is_chief:  # the only writer; and one question to Slurm is enough
        mounts = sources.proc / "self" / "mounts"
        findings.append(check_folder(outcomes["folder"], mounts.read_text() if mounts.exists() else ""))
        findings += check_slurm(topology, outcomes.get("scontrol"))
    return findings


def _precision_on_cpu(chosen: Mapping[str, object]) -> str:
    return "" if chosen.get("num_gpus") else str(chosen.get("precision", ""))


def _start_probes(config: TrainConfig, topology: Topology, sources: Sources, timeout_s: float) -> dict[str, Probe]:
    """All that may hang, started at once."""
    variables = sources.variables

    def child(module: str, *arguments: object, more: Mapping[str, str] | None = None) -> Probe:
        return start_child(module, *arguments, variables={**variables, **(more or {})}, timeout_s=timeout_s)

    probes = {
        "devices": child("devices", config, topology, more=_TALKATIVE),
        "dataset": child("dataset", config, topology),
        "network": child("network", job_hosts(topology)),
    }
    if isinstance(config.model, KerasConfig):
        probes["own_model"] = child("own_model", config, more=_WITHOUT_GPUS)
    programs = {"nvidia-smi": ["nvidia-smi", *QUERY]}
    if topology.is_chief:
        probes["folder"] = child("folder", config.run_dir, config.resume == "auto")
        if topology.slurm is not None:
            programs["scontrol"] = ["scontrol", "show", "config"]
    for name, (program, *words) in programs.items():
        if path := sources.program(program):
            with contextlib.suppress(OSError):  # not a program for this machine
                probes[name] = start_program([path, *words], variables=variables, timeout_s=timeout_s)
    return probes
