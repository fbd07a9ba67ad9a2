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

    Horovod's variables and TF_CONFIG take precedence over Slurm's, which every process of an allocation has.

    Raises:
        UserError: two launchers at once, or a variable that is unusable or contradicts the others.
    """
    env = Variables(environ)
    horovod = next((name for name in HOROVOD_NAMES if name in env), None)
    if horovod and "TF_CONFIG" in env:
        raise UserError(
            f"{env.shown(horovod)} and {env.shown('TF_CONFIG')} are both set: two launchers "
            "at once; unset one of them (horovodrun sets the first, multiworker needs the second)"
        )
    if env.number("OMPI_COMM_WORLD_SIZE", default=1, minimum=1) > 1 and not horovod and "TF_CONFIG" not in env:
        raise UserError(
            f"OMPI_COMM_WORLD_SIZE={env['OMPI_COMM_WORLD_SIZE']}: mpirun is not supported, each of its processes "
            "would train alone; start the job with horovodrun, srun or TF_CONFIG"
        )
    if horovod:
        topology = read_horovodrun(env)
    elif "TF_CONFIG" in env:
        topology = read_tf_config(env)
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
    return replace(
        topology,
        interface=env.get("HOROVOD_GLOO_IFACE"),
        visible_gpus=environ.get("CUDA_VISIBLE_DEVICES"),  # empty: no GPUs
        cpus_per_task=cpus or None if not isinstance(topology.launcher, Alone) else None,
        slurm=read_slurm_job(env),
        losses=Path(env[LOSSES_VARIABLE]) if LOSSES_VARIABLE in env else None,
    )


def _check_horovod_settings(env: Variables) -> None:
    for name, largest in _HOROVOD_SETTINGS.items():
        value = env.get(name, "0")
        if not re.fullmatch(r"[0-9]{1,12}(?:\.[0-9]{1,12})?", value) or float(value) > largest:
            raise UserError(f"{env.shown(name)}: must be a number from 0 to {largest}; correct it, or unset it")
