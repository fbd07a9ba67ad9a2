"""Slurm's settings, and what they mean for a training (slurm/README.md)."""

import re
from collections.abc import Mapping

from mnist_dist.base.errors import EXIT_FAILURE, EXIT_LOST_PEER, EXIT_PREEMPTED, EXIT_USER_ERROR
from mnist_dist.doctor.finding import Finding
from mnist_dist.doctor.probe import Outcome
from mnist_dist.launch.topology import Topology
from mnist_dist.launch.variables import printable

_KILL_WAIT_S = 30
_SLOW_S = 600


def parse_settings(text: str) -> dict[str, str]:
    """What `scontrol show config` prints, by name."""
    return {match[1]: match[2].strip() for match in re.finditer(r"^(\w+)\s*=[ \t]?(.*)$", text, re.MULTILINE)}


def check_slurm(topology: Topology, outcome: Outcome | None) -> list[Finding]:
    """What `scontrol show config` tells; `outcome` is None if there is no such program."""
    name = "Slurm"
    if topology.slurm is None:
        return [Finding(name, "ok", "not in a job of Slurm")]
    found = f"job {topology.slurm.job_id}, restarted {topology.slurm.restart_count} time(s)"
    if outcome is None:
        return [
            Finding(name, "unknown", f"{found}; no scontrol here (a container?), so Slurm's settings are unknown"),
            Finding("requeueing", "warning", "slurm/train.sh requeues with scontrol, which is not here", _CONTAINER),
        ]
    settings = parse_settings(outcome.stdout)
    if outcome.code != 0 or "KillWait" not in settings:
        reason = outcome.describe() if outcome.code != 0 else f"printed {printable(outcome.stdout, 80)!r}"
        fix = "ask the controller (scontrol ping); without it slurm/train.sh cannot requeue the job"
        return [Finding(name, "warning", f"{found}; scontrol show config {reason}", fix)]
    return [
        Finding(name, "ok", f"{found}, Slurm {settings.get('SLURM_VERSION', '?')}"),
        _check_kill_wait(settings),
        _check_slurmd_timeout(settings),
        *([_check_unkillable(settings)] if topology.world_size > topology.local_size else []),
        _check_requeue(settings),
    ]


_CONTAINER = "start slurm/train.sh outside of the container, and only Python in it (launcher=... in slurm/site.sh)"


def _check_kill_wait(settings: Mapping[str, str]) -> Finding:
    name, seconds = "KillWait", _seconds(settings["KillWait"])
    if seconds is None:
        return Finding(name, "unknown", f"KillWait={printable(settings['KillWait'], 40)}")
    found = f"{seconds} s to finish the epoch and save after scancel or at the time limit"
    if seconds < _KILL_WAIT_S:
        fix = "let Slurm warn earlier: #SBATCH --signal=SIGUSR2@90 (slurm/train.sh has it), and scancel --signal=USR2"
        return Finding(name, "warning", f"{found}: short (Slurm's default is {_KILL_WAIT_S})", fix)
    return Finding(name, "ok", found)


def _check_slurmd_timeout(settings: Mapping[str, str]) -> Finding:
    name, value = "SlurmdTimeout", settings.get("SlurmdTimeout", "")
    seconds = _seconds(value)
    if seconds is None:
        return Finding(name, "unknown", f"SlurmdTimeout={printable(value, 40)}")
    if seconds == 0:
        fix = "set SlurmdTimeout=300 in slurm.conf"
        return Finding(name, "warning", "0: Slurm never gives up a dead node, nor requeues its job", fix)
    found = (
        f"Slurm gives up a dead node after {seconds} s; the other ranks end after 30 s, with exit code {EXIT_LOST_PEER}"
    )
    if seconds > _SLOW_S:
        fix = "set SlurmdTimeout=300 in slurm.conf"
        found = f"{found}: a job that is requeued after a loss, or has ended, waits so long for the node"
        return Finding(name, "warning", found, fix)
    return Finding(name, "ok", found)


def _check_unkillable(settings: Mapping[str, str]) -> Finding:
    """Whether steps have the time to end while their srun is frozen.

    They try six times to tell it that their tasks have ended, `MessageTimeout` each time (`_send_srun_resp_msg` in
    src/slurmd/slurmstepd/mgr.c of Slurm 22.05); twice that is enough.
    """
    name = "UnkillableStepTimeout"
    values = {key: settings.get(key, "") for key in (name, "MessageTimeout")}
    seconds, message_s = map(_seconds, values.values())
    if seconds is None or message_s is None:
        return Finding(name, "unknown", ", ".join(f"{key}={printable(value, 40)}" for key, value in values.items()))
    if seconds < (enough := 12 * message_s):
        found = f"{seconds} s: when the node of the batch script freezes, Slurm may drain the job's other nodes as well"
        return Finding(name, "warning", found, f"set UnkillableStepTimeout={enough} in slurm.conf")
    return Finding(name, "ok", f"{seconds} s: a frozen node of the batch script does not drain the others")


def _check_requeue(settings: Mapping[str, str]) -> Finding:
    """Whether Slurm itself requeues or holds jobs with the exit codes of a training."""
    name = "RequeueExit"
    requeued, held = (exit_codes(settings.get(key, "")) for key in ("RequeueExit", "RequeueExitHold"))
    fix = "take the codes out of {}= in slurm.conf; slurm/train.sh requeues what should be"
    if useless := sorted(requeued & {EXIT_FAILURE, EXIT_USER_ERROR}):
        found = f"Slurm requeues jobs with exit code {_join(useless)}: a wrong input would start again and again"
        return Finding(name, "warning", found, fix.format(name))
    if twice := sorted(requeued & {EXIT_PREEMPTED, EXIT_LOST_PEER}):
        found = f"Slurm itself requeues jobs with exit code {_join(twice)}, without the limit of max_requeues"
        return Finding(name, "warning", found, fix.format(name))
    if stuck := sorted(held & {EXIT_FAILURE, EXIT_USER_ERROR, EXIT_PREEMPTED, EXIT_LOST_PEER}):
        found = f"Slurm holds jobs with exit code {_join(stuck)} (RequeueExitHold): they wait for scontrol release"
        return Finding(name, "warning", found, fix.format("RequeueExitHold"))
    return Finding(name, "ok", "Slurm leaves requeueing to slurm/train.sh")


def exit_codes(text: str) -> set[int]:
    """The exit codes of a setting such as `75,100-110`; none of `(null)`."""
    codes: set[int] = set()
    for first, last in re.findall(r"(\d{1,3})(?:-(\d{1,3}))?", text):
        codes.update(range(int(first), int(last or first) + 1))
    return codes


def _seconds(text: str) -> int | None:
    match = re.fullmatch(r"(\d{1,9})(?: ?sec)?", text)
    return int(match[1]) if match else None


def _join(codes: list[int]) -> str:
    return " and ".join(map(str, codes))
