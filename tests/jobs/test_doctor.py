"""The doctor's processes: real probes, killed where they hang, on real file systems; one table for all ranks."""

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
from support import CHECKOUT
from support.job import DOCTOR_HINT, TRAIN
from support.launchers import free_ports, horovodrun, local_addresses, srun, tf_config
from support.mounts import mount, unmount
from support.processes import wait_until

from mnist_dist.config.compose import compose_config
from mnist_dist.doctor.checks.network import check_names
from mnist_dist.doctor.checks.own_model import check_own_model
from mnist_dist.doctor.checks.storage import check_dataset, check_folder, check_shared_lock
from mnist_dist.doctor.probe import start_child, start_program
from mnist_dist.launch.topology import Topology

DOCTOR = ("-m", "mnist_dist.doctor")
FACTORIES = CHECKOUT / "tests" / "support" / "factories"
_BOUND_S = 150  # on a busy machine; seconds on an idle one


@pytest.fixture
def args(small_npz, tmp_path):
    return ["data=npz", f"data.path={small_npz}", f"run_dir={tmp_path / 'runs' / 'one'}", "timeout_s=90"]


@pytest.fixture
def stubs(tmp_path):
    """A folder for programs and packages that come first; returns the variables for it."""
    folder = tmp_path / "stubs"
    folder.mkdir()

    def create(programs=None, modules=None) -> dict[str, str]:
        for name, script in (programs or {}).items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)
        for name, code in (modules or {}).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(code)
        path = os.pathsep.join(filter(None, [str(folder), *sys.path]))
        return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": path}

    return create


def rows_of(result) -> dict[str, dict]:
    """The rows that were printed as JSON, by name."""
    return {row["name"]: row for row in json.loads(result.stdout)["rows"]}


def check(row, status, found, fix="") -> None:
    assert (row["status"], bool(row["fix"])) == (status, bool(fix)), row
    assert found in row["found"]
    assert fix in row["fix"]


def test_a_table(args, run_python, tmp_path):
    """Nothing is left behind."""
    before = set(tmp_path.rglob("*"))
    result = run_python(*DOCTOR, *args, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    names = {re.split("  +", line)[1] for line in result.stdout.splitlines() if line.startswith("ok  ")}
    assert {
        "Python", "TensorFlow", "Keras", "NumPy", "TensorFlow's import", "Horovod", "GPUs", "processor", "memory",
        "open files", "/dev/shm", "strategy", "precision", "reproducibility", "compiler", "threads", "data set",
        "run folder",
    } <= names  # fmt: skip
    assert "single (one process, 0 GPUs: training on the CPU)" in result.stdout
    assert re.search(r"^\d.* ok: nothing stands in the way of this training$", result.stdout, re.MULTILINE)
    assert {path for path in tmp_path.rglob("*") if "printed" not in str(path)} <= before


def test_wrong_usage(args, run_python):
    for word in ("data=nothing", "no_such_key=1", "timeout_s=0"):
        result = run_python(*DOCTOR, *args, word)
        assert (result.returncode, result.stdout) == (2, "")
        assert len(result.stderr.splitlines()) == 1


HANGING = """
import sys, time
if "-c" in sys.orig_argv[:2]:
    import os, socket
    def hang(*_, **__):
        time.sleep(600)
    os.statvfs = socket.getaddrinfo = hang
"""


def test_everything_hangs(args, run_python, stubs):
    """Each probe is killed, and says what it was waiting for."""
    sleep = "exec sleep 600"
    env = stubs(
        {"nvidia-smi": sleep, "scontrol": sleep},
        {"sitecustomize.py": HANGING, "tensorflow/__init__.py": "import time; time.sleep(600)"},
    )
    started_s = time.monotonic()
    result = run_python(*DOCTOR, *args, "timeout_s=5", "json=true", env={**env, "SLURM_JOB_ID": "7"}, fresh=True)
    assert time.monotonic() - started_s < _BOUND_S
    assert (result.returncode, result.stderr) == (1, "")
    rows, late = rows_of(result), "did not answer within 5 s"
    check(rows["TensorFlow's import"], "error", late, "strategy.start_timeout_s=600")
    check(rows["GPUs"], "error", f"nvidia-smi {late}", "drain the node")
    check(rows["run folder"], "error", f"space {late}", "name a run_dir on another file system")
    check(rows["host names"], "error", late, "/etc/resolv.conf")
    check(rows["Slurm"], "warning", f"scontrol show config {late}", "scontrol ping")
    check(rows["strategy"], "unknown", "TensorFlow did not answer")
    check(rows["CUDA"], "ok", "no GPUs")


def dist_info(name, version) -> dict[str, str]:
    return {f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"}


def test_packages_that_do_not_fit(args, run_python, stubs):
    """An old NumPy, a TensorFlow that cannot be imported, and a Horovod that was built for another one."""
    missing = "raise ModuleNotFoundError(\"No module named 'tensorflow'\")"
    env = stubs(modules={**dist_info("numpy", "1.24.0"), "tensorflow/__init__.py": missing})
    result = run_python(*DOCTOR, *args, "json=true", env=env, fresh=True)
    assert result.returncode == 1, result.stderr
    rows = rows_of(result)
    check(rows["NumPy"], "error", "numpy 1.24.0 does not fit", "make setup")
    check(rows["TensorFlow's import"], "error", "No module named 'tensorflow'", "make setup")
    check(rows["Horovod"], "unknown", "TensorFlow cannot be imported")


@pytest.fixture
def wrong_horovod(stubs):
    broken = 'raise ImportError("mpi_lib.so: undefined symbol: _ZN10tensorflow8internal21CheckOpMessageBuilder")'
    return stubs(
        {"nvidia-smi": "printf 'GPU-aa, NVIDIA H100, 550.54.15, 81559\\n'"},
        {"horovod/__init__.py": "", "horovod/tensorflow/__init__.py": broken},
    )


def test_a_horovod_for_another_tensorflow(args, run_python, wrong_horovod):
    """And a GPU that TensorFlow cannot use, since CUDA's driver library is missing."""
    result = run_python(*DOCTOR, *args, "json=true", "strategy=horovod", env=wrong_horovod, fresh=True)
    assert result.returncode == 1, result.stderr
    rows = rows_of(result)
    check(rows["Horovod"], "error", "was not built for the installed TensorFlow 2.", "build it again: make horovod")
    assert "undefined symbol" in rows["Horovod"]["found"]
    check(rows["GPUs"], "ok", "1 x NVIDIA H100, driver 550.54.15")
    check(rows["CUDA"], "error", "TensorFlow sees 0 of 1 GPU(s); libraries that it does not find: libcu", "make cuda")


def test_train_names_the_doctor(args, run_python, wrong_horovod):
    words = [word for word in args if not word.startswith("timeout_s")]
    result = run_python(*TRAIN, *words, "strategy=horovod", env=wrong_horovod, fresh=True)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: strategy=horovod: Horovod was not built for the installed TensorFlow")
    assert line.endswith(f"build it again: make horovod{DOCTOR_HINT}")


def test_a_network_that_cannot_be_trained(args, run_python):
    words = *DOCTOR, *args, "json=true", "model=keras", "model.factory=refused:mixing"
    result = run_python(*words, cwd=FACTORIES)
    assert result.returncode == 1, result.stderr
    row = rows_of(result)["network"]
    check(row, "error", "model.factory=refused:mixing: cannot be trained: centred (Centred): what it", "change this")


# Single probes


def variables() -> dict[str, str]:
    return dict(os.environ)


def test_a_program_is_killed_after_its_deadline():
    probe = start_program(["sleep", "600"], variables=variables(), timeout_s=0.2)
    outcome = probe.outcome()
    assert outcome.expired
    assert outcome.describe() == "did not answer within 0 s"
    assert probe.process.poll() == -9


def test_a_program_that_ignores_everything_but_sigkill():
    script = "trap '' TERM INT HUP; echo here; while :; do sleep 0.1; done"
    outcome = start_program(["sh", "-c", script], variables=variables(), timeout_s=0.5).outcome()
    assert (outcome.expired, outcome.stdout) == (True, "here\n")


def test_much_output_blocks_nobody():
    outcome = start_program(["sh", "-c", "yes | head -c 3000000"], variables=variables(), timeout_s=60).outcome()
    assert (outcome.code, len(outcome.stdout)) == (0, 3_000_000)


def folder_row(path: Path, *, resume: bool = True) -> dict:
    outcome = start_child("folder", str(path), resume, variables=variables(), timeout_s=60).outcome()
    finding = check_folder(outcome, Path("/proc/self/mounts").read_text())
    return {"status": finding.status, "found": finding.found, "fix": finding.fix}


@pytest.fixture
def disk(tmp_path):
    """Mounts a file system in memory with these options."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def create(options) -> Path:
        mount("-t", "tmpfs", "-o", options, "tmpfs", folder)
        mounted.append(folder)
        return folder

    yield create
    for one in mounted:
        unmount(one)


def test_a_small_disk(disk):
    folder = disk("size=100m")
    check(folder_row(folder / "run"), "warning", "MB free: little", "remove files")
    assert not list(folder.iterdir())


def test_a_full_disk(disk):
    folder = disk("size=200k")
    with (folder / "filled").open("wb", buffering=0) as stream, pytest.raises(OSError, match="No space left"):
        while True:
            stream.write(b"x" * 4096)
    check(folder_row(folder / "run"), "error", f"{folder / 'run'} (tmpfs at {folder}): 0 bytes free", "remove files")


def test_a_disk_that_takes_no_more_files(disk):
    folder = disk("size=100m,nr_inodes=3")
    (folder / "one").touch()
    (folder / "two").touch()
    row = folder_row(folder / "run")
    assert (row["status"], bool(row["fix"])) == ("error", True), row
    assert re.search("No space left on device|inodes", row["found"])


def test_a_read_only_disk(disk):
    folder = disk("size=100m,ro")
    check(folder_row(folder / "run"), "error", "cannot be written: Read-only file system", "name a run_dir on another")


def test_what_is_not_a_run_folder(tmp_path):
    (tmp_path / "thesis.tex").touch()
    check(folder_row(tmp_path), "error", "this folder is not empty and is not a run folder", "name another one")
    check(folder_row(tmp_path / "thesis.tex"), "error", "cannot be written", "name a run_dir on another")


def test_data_that_is_not_here_is_not_downloaded(tmp_path):
    config = compose_config("data=mnist", f"data.keras_home={tmp_path / 'keras'}")
    outcome = start_child("dataset", config, Topology(), variables=variables(), timeout_s=60).outcome()
    finding = check_dataset(config.data, outcome)
    path = tmp_path / "keras" / "datasets" / "mnist.npz"
    assert (finding.status, f"would download it to {path}" in finding.found) == ("warning", True), outcome
    assert not (tmp_path / "keras").exists()


@pytest.mark.parametrize(
    ("content", "found"), [(b"", "x.npz: "), (b"PK\3\4 cut off", "x.npz: "), (None, "No such file")]
)
def test_damaged_data(content, found, tmp_path):
    path = tmp_path / "x.npz"
    if content is not None:
        path.write_bytes(content)
    config = compose_config("data=npz", f"data.path={path}")
    outcome = start_child("dataset", config, Topology(), variables=variables(), timeout_s=60).outcome()
    finding = check_dataset(config.data, outcome)
    assert (finding.status, bool(finding.fix)) == ("error", True), outcome
    assert found in finding.found


@pytest.fixture
def network_row(small_npz, monkeypatch):
    """The row about a factory in this folder, tried in a process of its own."""
    monkeypatch.chdir(FACTORIES)

    def create(factory) -> dict:
        config = compose_config("model=keras", f"model.factory={factory}", "data=npz", f"data.path={small_npz}")
        outcome = start_child("own_model", config, variables=variables(), timeout_s=120).outcome()
        finding = check_own_model(config.model, outcome, mode="exact")
        return {"status": finding.status, "found": finding.found, "fix": finding.fix}

    return create


def test_a_network_that_can_be_trained(network_row):
    check(network_row("refused:good"), "ok", "model.factory=refused:good: 3 layers can be trained, 280 parameters")


def test_a_network_whose_function_ends_the_process(network_row):
    check(network_row("refused:leaves"), "error", "building and trying it ended with exit code 3", "look at")


def test_the_names_of_this_machine():
    outcome = start_child("network", ["localhost"], variables=variables(), timeout_s=60).outcome()
    assert outcome.answers["interfaces"]["lo"] is True
    assert "127.0.0.1" in outcome.answers["host localhost"]["addresses"]
    own = next(key for key in outcome.answers if key.startswith("host ")).removeprefix("host ")
    assert check_names(outcome, Topology(), own=own).status == "ok"


def test_a_lock_that_another_process_holds(tmp_path):
    holder = start_child("shared_lock", tmp_path / "run", None, variables=variables(), timeout_s=60)
    path = holder.answer("held")
    for held, status in ((path, "ok"), (f"{path}-not", "ok")):
        outcome = start_child("shared_lock", tmp_path, held, variables=variables(), timeout_s=60).outcome()
        finding = check_shared_lock(outcome.answers.get("lock"), outcome, Topology())
        assert finding.status == status
        assert ("sees the lock" in finding.found) == (held == path)
    holder.end()
    assert not list(tmp_path.iterdir())


def test_a_lock_goes_with_the_process_that_asked_for_it(tmp_path, start_python):
    code = (
        "import os, time; from pathlib import Path; from mnist_dist.doctor.probe import start_child\n"
        "start_child('shared_lock', Path('run').absolute(), None, variables=os.environ, timeout_s=60).answer('held')\n"
        "Path('held').touch(); time.sleep(600)"
    )
    job = start_python("-c", code, cwd=tmp_path)
    wait_until((tmp_path / "held").exists)
    assert len(list(tmp_path.glob(".doctor-*"))) == 1
    job.processes[0].kill()
    wait_until(lambda: not list(tmp_path.glob(".doctor-*")))


# Several ranks


def start_ranks(start_python, environments, args, per_rank=None):
    return [
        start_python(*DOCTOR, *args, *(per_rank or {}).get(rank, ()), env=env) for rank, env in enumerate(environments)
    ]


def finish(jobs):
    return [job.wait(_BOUND_S)[0] for job in jobs]


def test_one_table_under_horovodrun(args, start_python, tmp_path):
    job = start_python(*DOCTOR, *args, "json=true", prefix=[horovodrun(), "-np", "2"], fresh=True)
    (result,) = job.wait(_BOUND_S)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert not [line for line in lines if line.startswith("[1]<stdout>")]
    told = json.loads("\n".join(line.removeprefix("[0]<stdout>:") for line in lines))
    rows = {row["name"]: row for row in told["rows"]}
    assert [rank["rank"] for rank in told["ranks"]] == [0, 1]
    check(rows["processes"], "ok", "2 on 1 host(s), by horovod")
    check(rows["strategy"], "ok", "horovod (HOROVOD_RANK is set)")
    check(rows["lock seen by ranks"], "ok", "sees the lock")
    assert not list(tmp_path.glob("**/.doctor*"))


@pytest.mark.parametrize("launcher", ["TF_CONFIG", "srun"])
def test_the_rank_that_differs_is_marked(launcher, args, start_python):
    environments = tf_config(local_addresses(3)) if launcher == "TF_CONFIG" else srun(3)
    environments[1] = {**environments[1], "TF_ENABLE_ONEDNN_OPTS": "0"}
    zero, *others = finish(start_ranks(start_python, environments, [*args, "json=true"], {2: ["seed=7"]}))
    for other in others:
        assert (other.returncode, other.stdout, other.stderr) == (1, "", "")
    assert (zero.returncode, zero.stderr) == (1, "")
    rows = rows_of(zero)
    check(rows["processes"], "ok", f"3 on 1 host(s), by {'tf_config' if launcher == 'TF_CONFIG' else 'slurm'}")
    (seed,), (onednn,) = rows["configuration"]["deviations"], rows["variables"]["deviations"]
    assert (seed["rank"], seed["status"], seed["found"]) == (2, "error", "seed=7, not 0")
    assert (onednn["rank"], onednn["status"], onednn["fix"]) == (1, "error", "unset TF_ENABLE_ONEDNN_OPTS")
    assert seed["host"]


def test_a_rank_that_never_comes_is_named(args, start_python):
    addresses = local_addresses(3)
    environments = tf_config(addresses)[:2]
    started_s = time.monotonic()
    zero, one = finish(start_ranks(start_python, environments, [*args, "json=true", "strategy.start_timeout_s=3"]))
    assert time.monotonic() - started_s < _BOUND_S
    assert (one.returncode, one.stdout, one.stderr) == (1, "", "")
    assert (zero.returncode, zero.stderr) == (1, "")
    rows = rows_of(zero)
    check(rows["processes"], "error", f"rank 2 ({addresses[2]}) never reported; 2 of 3 did", "start all processes")
    assert {name for name, row in rows.items() if row["status"] == "error"} == {"processes"}


def test_a_rank_that_is_killed_before_it_reports_is_named(args, start_python, stubs):
    """It has come to the first meeting."""
    env = stubs({"nvidia-smi": 'test "$DIE" && kill -9 $PPID; exit 9'})
    environments = [{**env, **one} for one in srun(2)]
    environments[1]["DIE"] = "yes"
    short = [word for word in args if not word.startswith("timeout_s")] + ["timeout_s=15", "json=true"]
    short.append("strategy.start_timeout_s=10")
    zero, one = finish(start_ranks(start_python, environments, short))
    assert one.returncode == -9
    assert (zero.returncode, zero.stderr) == (1, "")
    check(rows_of(zero)["processes"], "error", "rank 1 (127.0.0.1) never reported", "look at the node")


def test_a_missing_rank_0_is_named_by_the_others(args, start_python):
    addresses = local_addresses(2)
    (result,) = finish(start_ranks(start_python, tf_config(addresses)[1:], [*args, "strategy.start_timeout_s=1"]))
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        f"[rank 1/2] error: rank 0 ({addresses[0]}), which prints the table, did not come within 1 s"
    )


def test_a_port_that_is_taken(args, start_python):
    import socket

    with socket.create_server(("127.0.0.1", free_ports(1)[0])) as server:
        addresses = local_addresses(2, {1: server.getsockname()[1]})
        zero, one = finish(start_ranks(start_python, tf_config(addresses), [*args, "json=true"]))
    assert (zero.returncode, one.returncode) == (1, 1), zero.stderr + one.stderr
    (deviation,) = rows_of(zero)["ports"]["deviations"]
    assert deviation["rank"] == 1
    assert "another program has this port" in deviation["found"]
    assert "give rank 1 another port" in deviation["fix"]
