"""Which launcher started this process: a mapping of environment variables in, a `Topology` out.

Nothing else reads the environment to learn about the job; everything else gets a `Topology`.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mnist_dist.base.errors import UserError
from mnist_dist.launch.horovodrun import HOROVOD_NAMES, read_horovodrun
from mnist_dist.launch.losses import LOSSES_VARIABLE
from mnist_dist.launch.slurm import read_slurm_job, read_slurm_step
from mnist_dist.launch.supervised import SUPERVISED_NAMES, read_supervised
from mnist_dist.launch.tf_config import read_tf_config
from mnist_dist.launch.topology import Alone, Topology
from mnist_dist.launch.variables import MAX_CORES, Variables

# Settings of Horovod with the largest value that it accepts; given anything else it exits without a message.
_HOROVOD_SETTINGS = {
    "HOROVOD_CACHE_CAPACITY": 10**6,
    "HOROVOD_CYCLE_TIME": 10**5,
    "HOROVOD_FUSION_THRESHOLD": 2**31 - 1,
    "HOROVOD_GLOO_TIMEOUT_SECONDS": 10**6,
}


def read_topology(environ: Mapping[str, str] = os.environ) -> Topology:
    """The process layout that the launcher set up. An empty variable counts as not set.

    The variables of mnist_dist.launch and Horovod, and TF_CONFIG, take precedence over Slurm's, which every process of
    an allocation has.

    Raises:
        UserError: two launchers at once, or a variable that is unusable or contradicts the others.
    """
    env = Variables(environ)
    launchers = {
        next((name for name in names if name in env), ""): read
        for names, read in (
            (SUPERVISED_NAMES, read_supervised),
            (HOROVOD_NAMES, read_horovodrun),
            (("TF_CONFIG",), read_tf_config),
        )
    }
    launchers.pop("", None)
    if len(launchers) > 1:
        first, second, *_ = launchers
        raise UserError(
            f"{env.shown(first)} and {env.shown(second)} are both set: two launchers at once; unset one of them "
            "(mnist_dist.launch sets MNIST_DIST_RANK, horovodrun HOROVOD_RANK, you TF_CONFIG)"
        )
    if env.number("OMPI_COMM_WORLD_SIZE", default=1, minimum=1) > 1 and not launchers:
        raise UserError(
            f"OMPI_COMM_WORLD_SIZE={env['OMPI_COMM_WORLD_SIZE']}: mpirun is not supported, each of its processes "
            "would train alone; start the job with python -m mnist_dist.launch, horovodrun, srun or TF_CONFIG"
        )
    if launchers:
        (read,) = launchers.values()
        topology = read(env)
    elif env.number("SLURM_STEP_NUM_TASKS", default=1, minimum=1) > 1:
        topology = read_slurm_step(env)
    elif "SLURM_STEP_NUM_TASKS" not in env and env.number("SLURM_PROCID", default=0) > 0:
        raise UserError(
            f"SLURM_PROCID={env['SLURM_PROCID']}: one of several tasks, but SLURM_STEP_NUM_TASKS is not set, so each "
            "would train alone; start the tasks with srun"
        )
    else:
        topology = Topology()
    _check_horovod_settings(env)
    cpus = env.number("SLURM_CPUS_PER_TASK", default=0, minimum=1, maximum=MAX_CORES)
    # Of a batch script whose processes mnist_dist.launch starts, the number counts for all of them together.
    is_for_each = not isinstance(topology.launcher, Alone) and SUPERVISED_NAMES[0] not in env
    return replace(
        topology,
        interface=env.get("HOROVOD_GLOO_IFACE"),
        visible_gpus=environ.get("CUDA_VISIBLE_DEVICES"),  # empty: no GPUs
        cpus_per_task=cpus or None if is_for_each else None,
        slurm=read_slurm_job(env),
        losses=Path(env[LOSSES_VARIABLE]) if LOSSES_VARIABLE in env else None,
    )


def _check_horovod_settings(env: Variables) -> None:
    for name, largest in _HOROVOD_SETTINGS.items():
        value = env.get(name, "0")
        if not re.fullmatch(r"[0-9]{1,12}(?:\.[0-9]{1,12})?", value) or float(value) > largest:
            raise UserError(f"{env.shown(name)}: must be a number from 0 to {largest}; correct it, or unset it")
