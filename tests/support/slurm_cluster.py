"""A Slurm cluster of two (or three) nodes with two fake GPUs each, all on this machine, for any user.

It needs Debian's packages `slurm-wlm` and `munge` installed, but not configured or running: key,
sockets, ports and state are the cluster's own, in its own folder, and it stops only what it started.

    python3 tests/support/slurm_cluster.py            # a shell in which sbatch, srun, squeue talk to the cluster
    python3 tests/support/slurm_cluster.py COMMAND    # or one command
    python3 tests/support/slurm_cluster.py --nodes 3  # of three nodes
"""

import argparse
import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
# Names that every machine resolves, to itself.
NODES = ("127.0.0.1", "127.0.0.2")
THREE_NODES = (*NODES, "127.0.0.3")
_START_S = 60
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

_SLURM_CONF = """\
ClusterName=mnist-dist-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1,sched_min_interval=0
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout={slurmd_timeout_s}
SlurmdParameters=config_overrides
MessageTimeout=10
MinJobAge=300
KillWait=10
# Six messages to a frozen srun take 10 s each (MessageTimeout) before a step ends; with the default of 60 its node may
# be drained meanwhile ("Kill task failed").
UnkillableStepTimeout=180
GresTypes=gpu
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=NO State=UP GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE OverSubscribe=NO State=UP PriorityTier=2 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """The programs of Slurm and MUNGE that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]


@contextlib.contextmanager
def run_cluster(nodes: Sequence[str] = NODES, *, slurmd_timeout_s: int = 300) -> Iterator[dict[str, str]]:
    """Start the cluster, yield the environment variables for its users, and stop it afterwards.

    Slurm gives up a node that has been silent for `slurmd_timeout_s` seconds.
    """
    # A short path, as a socket's may have at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    processes: list[subprocess.Popen[bytes]] = []
    environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    for name in [name for name in environment if name.startswith("SLURM_") and name != "SLURM_CONF"]:
        del environment[name]  # of a job that this runs in

    def start(*command: object) -> None:
        log = (folder / f"{command[0]}.out").open("ab")
        program = shutil.which(str(command[0]), path=_PATH) or str(command[0])
        # If this process is killed, they end as well.
        guard = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
        arguments = [*guard, program, *map(str, command[1:])]
        # In its own session, so that after Ctrl-C at the terminal we stop things in the right order.
        processes.append(subprocess.Popen(arguments, env=environment, stdout=log, stderr=log, start_new_session=True))

    try:
        _configure(folder, nodes, slurmd_timeout_s)
        start(
            *("munged", "--foreground", "--force", "--num-threads=2", f"--key-file={folder / 'munge.key'}"),
            *(f"--{name}-file={folder / f'munge.{name}'}" for name in ("pid", "log", "seed")),
            f"--socket={folder / 'munge.socket'}",
        )
        _wait_for(lambda: (folder / "munge.socket").exists(), "munged", folder)
        start("slurmctld", "-D", "-c")
        for node in nodes:
            start("slurmd", "-D", "-N", node)
        _wait_for(lambda: _nodes_in(environment, "idle") == set(nodes), "the nodes", folder)
        yield environment
    finally:
        # Including a job that was submitted a moment ago.
        deadline = time.monotonic() + 15
        while _num_jobs(environment) and time.monotonic() < deadline:
            subprocess.run(["scancel", f"--user={os.getuid()}"], env=environment, timeout=30, check=False)
            time.sleep(0.5)
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        for process in reversed(processes):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in _users_of(environment["SLURM_CONF"]):  # what a job has left behind
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def daemon_of(environment: dict[str, str], node: str) -> int:
    """The PID of a node's slurmd."""
    (pid,) = _daemons_of(environment, node)
    return pid


@contextlib.contextmanager
def lost_node(environment: dict[str, str], node: str, number: signal.Signals, *, spares_script=False) -> Iterator[None]:
    """Signal all that runs on a node: its slurmd, the job steps' daemons and their processes; at the end kill them.

    `spares_script`: but the batch script, what it has started itself, and slurmd.
    """
    lost: set[int] = set()
    try:
        # A node fails at once: none of its processes may see another one end, such as the second process of an srun,
        # which cancels the step when the first one is killed.
        while new := set(_processes_of(environment, node, with_script=not spares_script)) - lost:
            _signal(new, signal.SIGSTOP)
            lost |= new
        # Nor may one wake up: the kernel continues what is stopped when its parent ends. So children first.
        parents = {pid: _parent_of(pid) for pid in lost} if number != signal.SIGSTOP else {}
        while parents:
            leaves = parents.keys() - set(parents.values())
            _signal(leaves, number)
            parents = {pid: parent for pid, parent in parents.items() if pid not in leaves}
        yield
    finally:
        if not spares_script:
            _signal(_processes_of(environment, node, with_script=True), signal.SIGKILL)


@contextlib.contextmanager
def frozen_controller(environment: dict[str, str]) -> Iterator[None]:
    """No command of Slurm is answered while the block runs; what runs already goes on."""
    pid = int((Path(environment["SLURM_CONF"]).parent / "slurmctld.pid").read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def revive(environment: dict[str, str], node: str) -> None:
    """Start the slurmd of a node if it was lost, and wait until Slurm uses the node again."""
    if _daemons_of(environment, node) and node in _nodes_in(environment, "idle,mixed"):
        return
    log = (Path(environment["SLURM_CONF"]).parent / "slurmd.out").open("ab")
    subprocess.Popen(
        [shutil.which("slurmd", path=_PATH) or "slurmd", "-D", "-N", node],
        env=environment,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )  # ends with the cluster
    folder = Path(environment["SLURM_CONF"]).parent
    _wait_for(lambda: node in _nodes_in(environment, "idle,mixed"), f"node {node}", folder)


def revive_all(environment: dict[str, str]) -> None:
    """Start what was lost, and end all jobs, so that the next one gets the first nodes."""
    subprocess.run(["scancel", f"--user={os.getuid()}"], env=environment, timeout=60, check=True)
    for node in THREE_NODES:
        revive(environment, node)
    folder = Path(environment["SLURM_CONF"]).parent
    _wait_for(lambda: _nodes_in(environment, "idle") == set(THREE_NODES), "all nodes without jobs", folder)


def configure(environment: dict[str, str], **settings: int) -> None:
    """Change settings of slurm.conf, such as `SlurmdTimeout`, for jobs that are started from now on."""
    path = Path(environment["SLURM_CONF"])
    text = path.read_text()
    for name, value in settings.items():
        text, count = re.subn(rf"(?m)^{name}=.*", f"{name}={value}", text)
        assert count == 1, name
    path.write_text(text)
    subprocess.run(["scontrol", "reconfigure"], env=environment, timeout=60, check=True)


def leftovers(environment: dict[str, str], node: str) -> list[str]:
    """The commands that still run on a node, besides its slurmd, and its zombies."""
    found = _processes_of(environment, node, with_script=True)
    commands = [" ".join(_command_of(pid)) for pid in found if not _command_of(pid)[0].endswith("slurmd")]
    zombies = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text().rpartition(")")
            state, parent = rest.split()[:2]
            if state == "Z" and int(parent) in found:
                zombies.append(f"zombie {name}")
    return [*commands, *zombies]


def _processes_of(environment: dict[str, str], node: str, *, with_script: bool) -> list[int]:
    """All that runs on a node, its slurmd first."""
    variables = {pid: _environment_of(pid) for pid in _users_of(environment["SLURM_CONF"])}
    tasks = [pid for pid, own in variables.items() if f"SLURMD_NODENAME={node}".encode() in own]
    if not with_script:
        tasks = [pid for pid in tasks if any(one.startswith(b"SLURM_STEP_NODELIST=") for one in variables[pid])]
    steps = {_parent_of(pid) for pid in tasks}
    steps = {pid for pid in steps if pid and _command_of(pid)[0].startswith("slurmstepd")}
    return [*(_daemons_of(environment, node) if with_script else []), *steps, *tasks]


def _daemons_of(environment: dict[str, str], node: str) -> list[int]:
    """The PID of a node's slurmd; none if it does not run."""
    pids = _users_of(environment["SLURM_CONF"])
    return [
        pid for pid in pids if _command_of(pid)[-3:] == ["-D", "-N", node] and _command_of(pid)[0].endswith("slurmd")
    ]


def _parent_of(pid: int) -> int:
    with contextlib.suppress(OSError):  # it has just ended
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _configure(folder: Path, nodes: Sequence[str], slurmd_timeout_s: int) -> None:
    folder.chmod(0o711)  # munged wants its clients to reach the socket
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    ctld_port, *node_ports = _free_ports(1 + len(nodes))
    host = socket.gethostname()
    lines = [
        # More cores than a small machine has, for two nodes and jobs side by side; config_overrides allows it.
        f"NodeName={node} NodeHostname={host} NodeAddr={node} Port={port}"
        " CPUs=8 RealMemory=4000 Gres=gpu:2 State=UNKNOWN"
        for node, port in zip(nodes, node_ports, strict=True)
    ]
    content = _SLURM_CONF.format(
        host=host,
        user=os.getuid(),
        folder=folder,
        ctld_port=ctld_port,
        nodes="\n".join(lines),
        slurmd_timeout_s=slurmd_timeout_s,
    )
    (folder / "slurm.conf").write_text(content)
    # Two device files that exist everywhere; nothing opens them.
    gres = [f"NodeName={node} Name=gpu File={file}" for node in nodes for file in ("/dev/null", "/dev/zero")]
    (folder / "gres.conf").write_text("\n".join(gres) + "\n")


def _nodes_in(environment: dict[str, str], state: str) -> set[str]:
    command = ["sinfo", "--noheader", "--Node", f"--states={state}", "--responding", "--format=%N"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return set(result.stdout.split())  # of each partition


def _num_jobs(environment: dict[str, str]) -> int:
    if not Path(environment["SLURM_CONF"]).exists():
        return 0
    try:
        result = subprocess.run(["squeue", "--noheader"], env=environment, capture_output=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:  # no cluster to ask
        return 0
    return len(result.stdout.splitlines())


def _users_of(slurm_conf: str) -> list[int]:
    """This user's processes whose cluster is that of this file; not this process, which never sets it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"SLURM_CONF={slurm_conf}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def _environment_of(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):  # it has just ended
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []


def _command_of(pid: int) -> list[str]:
    with contextlib.suppress(OSError):  # it has just ended
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1] or [""]
    return [""]


def _wait_for(condition: Callable[[], bool], what: str, folder: Path) -> None:
    deadline = time.monotonic() + _START_S
    while not condition():
        if time.monotonic() > deadline:
            logs = [
                f"== {path.name}\n{path.read_text()[-3000:]}" for path in [*folder.glob("*.log"), *folder.glob("*.out")]
            ]
            raise RuntimeError(f"waited {_START_S} s in vain for {what}\n" + "\n".join(logs))
        time.sleep(0.2)


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [server.getsockname()[1] for server in servers]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, choices=[2, 3], default=2)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="by default a shell")
    options = parser.parse_args()
    if missing := missing_programs():
        print(
            f"not installed: {', '.join(missing)}; Debian and Ubuntu: apt-get install slurm-wlm munge", file=sys.stderr
        )
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stops the cluster on the way out
    with run_cluster(THREE_NODES[: options.nodes]) as environment:
        if not options.command:
            print(f"A cluster of {options.nodes} nodes; it ends with this shell. Try: sinfo", file=sys.stderr)
        command = options.command or [os.environ.get("SHELL", "/bin/sh")]
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
