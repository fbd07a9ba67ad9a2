"""The doctor's checks on environments that are described, and the merging of what many ranks have found."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mnist_dist.config.compose import compose_config
from mnist_dist.doctor.checks.choices import check_choices, check_configuration
from mnist_dist.doctor.checks.gpus import check_cuda, check_driver, check_shares, parse_gpus
from mnist_dist.doctor.checks.machine import (
    check_cores,
    check_memory,
    check_open_files,
    check_processor,
    check_shm,
    cpu_quota,
)
from mnist_dist.doctor.checks.network import check_clocks, check_interfaces, check_names, check_ports
from mnist_dist.doctor.checks.own_model import check_own_model
from mnist_dist.doctor.checks.slurm import check_slurm, exit_codes, parse_settings
from mnist_dist.doctor.checks.software import (
    Package,
    check_code,
    check_horovod,
    check_packages,
    check_python,
    check_tensorflow,
    check_variables,
    digest_of,
)
from mnist_dist.doctor.checks.storage import (
    check_dataset,
    check_folder,
    check_pretrained,
    check_shared_lock,
    describe_mount,
)
from mnist_dist.doctor.children.devices import _choices
from mnist_dist.doctor.finding import Finding, RankReport
from mnist_dist.doctor.merge import merge
from mnist_dist.doctor.probe import Outcome
from mnist_dist.doctor.sources import Sources
from mnist_dist.doctor.table import summarize, to_json, verdict
from mnist_dist.launch.topology import HorovodRun, SlurmJob, Step, TFConfig, Topology
from mnist_dist.launch.variables import Variables


def answered(code=0, stderr="", stdout=None, **answers) -> Outcome:
    """A probe that answered; `_` in a topic stands for a blank."""
    lines = [json.dumps([topic.replace("_", " "), answer]) for topic, answer in answers.items()]
    return Outcome(code, "\n".join(lines) if stdout is None else stdout, stderr, 30)


EXPIRED = Outcome(None, "", "", 30)
SLURM = SlurmJob("7", "n[1-2]")
STEP = Step(("n1", "n2"), ("n1:20000",), "7.0.0")


def check(finding, status, found, fix="") -> None:
    assert (finding.status, bool(finding.fix)) == (status, bool(fix)), finding
    assert found in finding.found
    assert fix in finding.fix


# Software

PACKAGES = {
    "mnist-dist": Package("0.1.0", ("numpy>=2.0", "tensorflow<2.22,>=2.21", "keras<3.16,>=3.15", "rich>=13")),
    "tensorflow": Package("2.21.0", ("keras>=3.12.0", "numpy>=1.26.0", 'nvidia-cudnn-cu12>=9; extra == "and-cuda"')),
    "keras": Package("3.15.1", ("numpy",)),
    "numpy": Package("2.4.6"),
    "rich": Package("15.0.0"),
}


def findings_of(**changed) -> dict[str, Finding]:
    """The rows of packages, with other versions; None removes one."""
    packages = dict(PACKAGES)
    for name, version in changed.items():
        if version is None:
            del packages[name.replace("_", "-")]
        else:
            packages[name] = packages[name]._replace(version=version)
    return {finding.name: finding for finding in check_packages(packages)}


@pytest.mark.parametrize(("version", "status"), [("3.9.18", "error"), ("3.11.7", "ok"), ("3.14.0", "error")])
def test_python(version, status):
    check(check_python(version), status, version, "make setup PYTHON=" if status == "error" else "")


def test_packages_that_fit():
    assert {name: (row.status, row.found) for name, row in findings_of().items()} == {
        "TensorFlow": ("ok", "2.21.0"),
        "Keras": ("ok", "3.15.1"),
        "NumPy": ("ok", "2.4.6"),
        "other packages": ("ok", "all that are required"),
    }


def test_a_missing_tensorflow():
    check(findings_of(tensorflow=None)["TensorFlow"], "error", "not installed", "make setup")


def test_tensorflow_by_another_name():
    packages = {**PACKAGES, "tensorflow-cpu": PACKAGES["tensorflow"]}
    del packages["tensorflow"]
    check(check_packages(packages)[0], "ok", "2.21.0")


def test_a_numpy_that_is_too_old():
    found = "numpy 1.24.0 does not fit mnist-dist 0.1.0, which needs >=2.0"
    check(findings_of(numpy="1.24.0")["NumPy"], "error", found, "make setup")


def test_a_keras_that_does_not_fit_tensorflow():
    packages = {**PACKAGES, "mnist-dist": Package("0.1.0"), "keras": Package("2.15.0")}
    check(check_packages(packages)[1], "error", "keras 2.15.0 does not fit tensorflow 2.21.0", "make setup")


def test_another_package_is_missing():
    check(findings_of(rich=None)["other packages"], "error", "rich is not installed", "make setup")


def test_a_package_that_is_not_installed_itself():
    check(findings_of(mnist_dist=None)["other packages"], "unknown", "mnist-dist is not installed", "make setup")


TENSORFLOW = {"version": "2.21.0", "keras": "3.15.1", "seconds": 4.0, "build": {}}


def test_tensorflow_is_imported():
    check(check_tensorflow(answered(tensorflow=TENSORFLOW)), "ok", "TensorFlow 2.21.0, Keras 3.15.1, 4.0 s")


@pytest.mark.parametrize(
    ("outcome", "found", "fix"),
    [
        (EXPIRED, "did not answer within 30 s", "strategy.start_timeout_s=600"),
        (answered(1, "x\nImportError: libfoo.so\n"), "exit code 1: ImportError: libfoo.so", "make setup"),
        (answered(-4), "was ended by SIGILL", "use another node"),
        (answered(-11), "was ended by SIGSEGV", "make setup"),
    ],
)
def test_tensorflow_cannot_be_imported(outcome, found, fix):
    check(check_tensorflow(outcome), "error", found, fix)


HOROVOD = {**PACKAGES, "horovod": Package("0.28.1")}
BUILT = {"version": "0.28.1", "gloo": True, "nccl": False, "mpi": False}


@pytest.mark.parametrize(
    ("packages", "told", "options", "expected"),
    [
        (PACKAGES, {"error": "x"}, {"needed": True}, ("error", "not installed, and strategy=horovod", "make horovod")),
        (PACKAGES, {"error": "x"}, {}, ("ok", "not needed")),
        (
            HOROVOD,
            {"error": "not built for TF; make horovod"},
            {"needed": True},
            ("error", "not built", "make horovod"),
        ),
        (HOROVOD, {"error": "not built for TF; make horovod"}, {}, ("warning", "not built", "make horovod")),
        (HOROVOD, BUILT, {"needed": True}, ("ok", "built in: Gloo")),
        (HOROVOD, BUILT, {"num_gpus": 2}, ("warning", "without NCCL", "HOROVOD_GPU_OPERATIONS=NCCL make horovod")),
        (HOROVOD, {**BUILT, "gloo": False}, {"needed": True}, ("error", "built in: nothing", "make horovod")),
    ],
)
def test_horovod(packages, told, options, expected):
    options = {"needed": False, "num_gpus": 0, **options}
    check(check_horovod(packages, answered(tensorflow=TENSORFLOW, horovod=told), **options), *expected)


def test_a_horovod_that_ends_the_process():
    outcome = answered(-11, tensorflow=TENSORFLOW)
    finding = check_horovod(HOROVOD, outcome, needed=True, num_gpus=0)
    check(finding, "error", "loading it was ended by SIGSEGV", "make horovod")


def test_variables_that_change_results():
    finding = check_variables({"TF_ENABLE_ONEDNN_OPTS": "0", "NVIDIA_TF32_OVERRIDE": "1", "OTHER": "x"})
    check(finding, "warning", "TF_ENABLE_ONEDNN_OPTS=0", "unset TF_ENABLE_ONEDNN_OPTS NVIDIA_TF32_OVERRIDE")


def test_another_backend_of_keras_has_no_effect():
    check(check_variables({"KERAS_BACKEND": "jax"}), "ok", "KERAS_BACKEND=jax has no effect")


def test_the_digest_of_code(tmp_path):
    (tmp_path / "a.py").write_text("1")
    first = digest_of([(tmp_path, tmp_path / "a.py")])
    (tmp_path / "a.py").write_text("2")
    assert digest_of([(tmp_path, tmp_path / "a.py")]) != first


# GPUs

TWO_GPUS = "GPU-aa, NVIDIA H100, 550.54.15, 81559\nGPU-bb, NVIDIA H100, 550.54.15, 81559\n"
GPUS = parse_gpus(TWO_GPUS)
BUILD = {
    "cuda_version": "12.5.1",
    "cudnn_version": "9",
    "is_cuda_build": True,
    "cuda_compute_capabilities": ["sm_60", "sm_70", "compute_90"],
}


@pytest.mark.parametrize(
    ("outcome", "status", "found", "fix"),
    [
        (None, "ok", "none: no driver", ""),
        (EXPIRED, "error", "nvidia-smi did not answer within 30 s", "drain the node"),
        (answered(stdout=TWO_GPUS), "ok", "2 x NVIDIA H100, driver 550.54.15", ""),
        (
            answered(stdout="Segmentation fault\n"),
            "unknown",
            "printed something else than GPUs: Segmentation fault",
            "",
        ),
        (
            answered(9, stdout="NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."),
            "error",
            "couldn't communicate with the NVIDIA driver",
            "modprobe nvidia",
        ),
        (
            answered(18, stdout="Failed to initialize NVML: Driver/library version mismatch"),
            "error",
            "version mismatch",
            "restart the node",
        ),
        (answered(6, stdout="No devices were found"), "warning", "no GPU that this job may use", "--gpus-per-node=1"),
        (answered(stdout=""), "warning", "no GPU that this job may use", "--gpus-per-node=1"),
    ],
)
def test_the_driver(outcome, status, found, fix, tmp_path):
    check(check_driver(outcome, tmp_path)[0], status, found, fix)


def test_a_driver_without_nvidia_smi(tmp_path):
    (tmp_path / "nvidiactl").touch()
    check(check_driver(None, tmp_path)[0], "warning", "no nvidia-smi", "--nv")


@pytest.mark.parametrize(
    ("gpus", "topology", "variables", "expected"),
    [
        ([], Topology(), {}, ("ok", "none")),
        (GPUS, Topology(), {}, ("ok", "2 of 2")),
        (GPUS, Topology(visible_gpus="1"), {}, ("ok", "1 of 1 (CUDA_VISIBLE_DEVICES=1)")),
        (GPUS, Topology(visible_gpus=""), {}, ("warning", "they are hidden", "unset CUDA_VISIBLE_DEVICES")),
        (GPUS, Topology(visible_gpus="0,5"), {}, ("error", "names GPUs that are not here", "unset CUDA_VISIBLE")),
        ([], Topology(), {"SLURM_GPUS_ON_NODE": "4"}, ("warning", "Slurm has given SLURM_GPUS_ON_NODE=4", "--nv")),
        (GPUS, Topology(STEP, 0, 3, 0, 3), {}, ("error", "3 processes on this machine but 2 GPUs", "one process per")),
        (
            [*GPUS, GPUS[0]._replace(uuid="GPU-cc")],
            Topology(STEP, 0, 2, 0, 2),
            {},
            ("warning", "1 of them idle", "--ntasks-per-node=3"),
        ),
    ],
)
def test_the_gpus_of_a_rank(gpus, topology, variables, expected):
    check(check_shares(gpus, topology, Variables(variables)), *expected)


def devices(*capabilities, build=None, stderr="") -> Outcome:
    gpus = [{"name": "x", "compute_capability": capability} for capability in capabilities]
    return answered(tensorflow={**TENSORFLOW, "build": {**BUILD, **(build or {})}}, gpus=gpus, stderr=stderr)


DLOPEN = "x.cc:1] Could not load dynamic library 'libcudnn.so.9'; dlerror: libcudnn.so.9: cannot open\n"


@pytest.mark.parametrize(
    ("gpus", "outcome", "expected"),
    [
        ([], devices(), ("ok", "not needed")),
        (GPUS, devices([9, 0], [9, 0]), ("ok", "CUDA 12.5.1, compute capability 9.0")),
        (
            GPUS,
            devices(stderr=DLOPEN),
            ("error", "sees 0 of 2 GPU(s); libraries that it does not find: libcudnn.so.9", "make cuda"),
        ),
        (GPUS, devices([5, 2], [5, 2]), ("error", "TensorFlow's kernels start at 6.0", "use GPUs of 6.0 or later")),
        (GPUS, devices([12, 0], [12, 0]), ("warning", "newer than TensorFlow's kernels (9.0)", "start_timeout_s=600")),
        (GPUS, devices(build={"is_cuda_build": False}), ("warning", "built without CUDA", "make cuda")),
        (
            [g._replace(driver="470.82") for g in GPUS],
            devices([9, 0], [9, 0]),
            ("error", "driver 470.82 is too old", "driver 525"),
        ),
        (GPUS, EXPIRED, ("unknown", "did not say which GPUs")),
    ],
)
def test_cuda(gpus, outcome, expected):
    check(check_cuda(gpus, Topology(), outcome), *expected)


# The machine


@pytest.mark.parametrize(
    ("text", "precision", "expected"),
    [
        ("model name : Xeon\nflags : fpu avx avx512_bf16\n", "mixed_bfloat16", ("ok", "Xeon, with bfloat16")),
        ("model name : Xeon\nflags : fpu avx\n", "float32", ("ok", "Xeon, without bfloat16")),
        ("model name : Xeon\nflags : fpu avx\n", "mixed_bfloat16", ("warning", "is emulated", "precision=float32")),
        ("model name : Old\nflags : fpu sse2\n", "float32", ("error", "no AVX", "newer processor")),
        ("Features : fp asimd bf16\n", "float32", ("ok", "with bfloat16")),
        ("nothing", "float32", ("unknown", "does not tell its instructions")),
    ],
)
def test_the_processor(text, precision, expected, tmp_path):
    (tmp_path / "cpuinfo").write_text(text)
    check(check_processor(tmp_path, precision=precision), *expected)


@pytest.fixture
def machine(tmp_path):
    """Sources with the given files, and no others."""

    def create(files=None) -> Sources:
        for name, text in {"proc/self/cgroup": "0::/job\n", **(files or {})}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return Sources({}, tmp_path / "proc", tmp_path / "cgroups", tmp_path / "dev")

    return create


V1 = {"proc/self/cgroup": "3:cpu,cpuacct:/job\n"}


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cgroups/job/cpu.max": "150000 100000\n"}, 1.5),
        ({"cgroups/job/cpu.max": "max 100000\n", "cgroups/cpu.max": "400000 100000\n"}, 4),
        ({**V1, "cgroups/cpu/job/cpu.cfs_quota_us": "200000", "cgroups/cpu/job/cpu.cfs_period_us": "100000"}, 2),
        ({**V1, "cgroups/cpu/job/cpu.cfs_quota_us": "-1", "cgroups/cpu/job/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_control_group(files, quota, machine):
    assert cpu_quota(machine(files)) == quota


@pytest.mark.parametrize(
    ("topology", "cores", "files", "expected"),
    [
        (Topology(), 8, {}, ("ok", "8 for this process, of 8")),
        (Topology(STEP, 0, 2, 0, 2, cpus_per_task=4), 8, {}, ("ok", "4 for this process by Slurm, of 8")),
        (Topology(cpus_per_task=8), 1, {}, ("warning", "SLURM_CPUS_PER_TASK=8", "srun --cpus-per-task=8")),
        (Topology(STEP, 0, 4, 0, 4), 2, {}, ("warning", "2 core(s) for 4 processes", "start fewer processes")),
        (Topology(), 8, {"cgroups/job/cpu.max": "200000 100000"}, ("warning", "allows 2", "threads.inter_op=2")),
    ],
)
def test_cores(topology, cores, files, expected, machine):
    check(check_cores(topology, machine(files), num_cores=cores), *expected)


@pytest.mark.parametrize(
    ("local_size", "available", "expected"),
    [
        (1, 8e9, ("ok", "8 GB free")),
        (8, 8e9, ("warning", "1 GB for each of 8 processes", "--mem=")),
        (1, 0.5e9, ("error", "TensorFlow alone needs 700 MB", "--mem=")),
    ],
)
def test_memory(local_size, available, expected, machine):
    topology = Topology(STEP, 0, local_size, 0, local_size)
    sources = machine({"proc/meminfo": "MemTotal: 64000000 kB\n"})
    check(check_memory(topology, sources, available=available), *expected)


def test_memory_limited_by_a_control_group(machine):
    sources = machine({"proc/meminfo": "MemTotal: 64000000 kB\n", "cgroups/job/memory.max": "500000000"})
    check(check_memory(Topology(), sources, available=32e9), "error", "500 MB free of 500 MB", "docker --memory")


def test_no_shared_memory(tmp_path):
    check(check_shm(tmp_path, num_gpus=0, local_size=1), "ok", "there is none")
    check(check_shm(tmp_path, num_gpus=2, local_size=1), "warning", "too little for NCCL", "--shm-size=1g")


@pytest.mark.parametrize(
    ("soft", "world_size", "expected"),
    [
        (1024, 2, ("ok", "at most 1024")),
        (512, 2, ("warning", "at most 512", "ulimit -n 4096")),
        (1024, 1000, ("error", "needs about 3200", "ulimit -n 6400")),
    ],
)
def test_open_files(soft, world_size, expected):
    check(check_open_files(Topology(STEP, 0, world_size), soft=soft), *expected)


# Slurm

CONFIG = """Configuration data as of 2026-11-26T09:00:00
KillWait                = {kill} sec
MessageTimeout          = {message} sec
RequeueExit             = {requeue}
RequeueExitHold         = {hold}
SlurmdTimeout           = {slurmd} sec
SLURM_VERSION           = 22.05.8
UnkillableStepTimeout   = {unkillable} sec

Slurmctld(primary) at node0 is UP
"""


SETTINGS = {"kill": 30, "message": 10, "slurmd": 300, "requeue": "(null)", "hold": "(null)", "unkillable": 120}


def rows_of_slurm(*, world_size=2, **values) -> dict[str, Finding]:
    topology = Topology(world_size=world_size, slurm=SLURM)
    text = CONFIG.format(**{**SETTINGS, **values})
    return {finding.name: finding for finding in check_slurm(topology, answered(stdout=text))}


def test_slurm_as_it_should_be():
    rows = rows_of_slurm()
    assert {row.status for row in rows.values()} == {"ok"}
    assert "Slurm 22.05.8" in rows["Slurm"].found
    assert "30 s to finish the epoch" in rows["KillWait"].found
    assert rows["UnkillableStepTimeout"].found.startswith("120 s")


def test_no_other_node_can_be_drained():
    assert "UnkillableStepTimeout" not in rows_of_slurm(world_size=1, unkillable=60)


def test_an_unknown_setting_of_slurm():
    check(rows_of_slurm(message="?")["UnkillableStepTimeout"], "unknown", "=120 sec, MessageTimeout=? sec")


@pytest.mark.parametrize(
    ("row", "values", "found", "fix"),
    [
        ("KillWait", {"kill": 5}, "5 s to finish the epoch", "--signal=SIGUSR2@90"),
        ("SlurmdTimeout", {"slurmd": 0}, "never gives up a dead node", "SlurmdTimeout=300"),
        ("SlurmdTimeout", {"slurmd": 3600}, "waits so long for the node", "SlurmdTimeout=300"),
        ("UnkillableStepTimeout", {"unkillable": 60}, "60 s: ", "UnkillableStepTimeout=120"),
        ("UnkillableStepTimeout", {"message": 30}, "120 s: ", "UnkillableStepTimeout=360"),
        ("RequeueExit", {"requeue": "1-5"}, "exit code 1 and 2", "take the codes out of RequeueExit="),
        (
            "RequeueExit",
            {"requeue": "75,76"},
            "without the limit of max_requeues",
            "take the codes out of RequeueExit=",
        ),
        ("RequeueExit", {"hold": "70-80"}, "holds jobs with exit code 75 and 76", "RequeueExitHold="),
    ],
)
def test_settings_of_slurm(row, values, found, fix):
    check(rows_of_slurm(**values)[row], "warning", found, fix)


def test_slurm_without_scontrol():
    rows = check_slurm(Topology(slurm=SLURM), None)
    check(rows[0], "unknown", "no scontrol here")
    check(rows[1], "warning", "not here", "launcher=...")


def test_slurms_controller_does_not_answer():
    for outcome in (EXPIRED, answered(1, "slurm_load_ctl_conf error: Unable to contact"), answered(stdout="hello")):
        check(check_slurm(Topology(slurm=SLURM), outcome)[0], "warning", "scontrol show config", "scontrol ping")


def test_outside_of_slurm():
    (row,) = check_slurm(Topology(), answered(1))
    check(row, "ok", "not in a job")


def test_reading_slurms_settings():
    assert parse_settings("A = \nKillWait=30 sec\n") == {"A": "", "KillWait": "30 sec"}
    assert exit_codes("75,100-102") == {75, 100, 101, 102}


# Network

UP = {"lo": True, "eth0": True, "ib0": False}


def names(hosts, *, own="n1", topology=None, interfaces=UP):
    """What a machine called `own` tells of the hosts: {host: (addresses, interface)}."""
    lines = {"interfaces": interfaces} if interfaces else {}
    lines |= {f"host {host}": {"addresses": a, "interface": i} for host, (a, i) in hosts.items()}
    return answered(stdout="\n".join(json.dumps([key, value]) for key, value in lines.items()))


GOOD = {"n1": (["10.0.0.1"], "eth0"), "n2": (["10.0.0.2"], "eth0")}
TWO = Topology(STEP, 0, 2)
ONE_OF_TWO = Topology(HorovodRun("n1:5"), 1, 2)


@pytest.mark.parametrize(
    ("hosts", "topology", "expected"),
    [
        (GOOD, TWO, ("ok", "n2 -> 10.0.0.2")),
        ({**GOOD, "n2": ([], None)}, TWO, ("error", "n2 has no address here", "/etc/hosts")),
        (
            {**GOOD, "n2": (["127.0.1.1"], "lo")},
            TWO,
            ("error", "n2, another host, resolves to 127.0.1.1", "/etc/hosts"),
        ),
        (
            {**GOOD, "n1": (["127.0.1.1"], "lo")},
            TWO,
            ("warning", "n1, this host, resolves only to 127.0.1.1", "HOROVOD_GLOO_IFACE"),
        ),
        ({"n1": (["127.0.1.1"], "lo")}, Topology(), ("ok", "a single host")),
        (
            {"n1": (["127.0.1.1"], "lo")},
            Topology(HorovodRun("a:1"), 0, 4, 0, 2),
            ("warning", "resolves only to 127.0.1.1", "/etc/hosts"),
        ),
        ({"n1": (["10.0.0.1"], "eth0")}, TWO, ("error", "looking up n2", "/etc/resolv.conf")),
    ],
)
def test_names_of_hosts(hosts, topology, expected):
    check(check_names(names(hosts), topology, own="n1"), *expected)


@pytest.mark.parametrize(
    ("interface", "variables", "expected"),
    [
        (None, {}, ("ok", "eth0 towards the other hosts")),
        ("eth0", {}, ("ok", "eth0 (HOROVOD_GLOO_IFACE)")),
        ("eth7", {}, ("error", "HOROVOD_GLOO_IFACE=eth7: no such interface", "one of lo, eth0, ib0")),
        ("ib0", {}, ("error", "this interface is down", "ip link set ib0 up")),
        (None, {"NCCL_SOCKET_IFNAME": "ib1"}, ("error", "NCCL_SOCKET_IFNAME=ib1: no such", "one of lo, eth0, ib0")),
        (None, {"NCCL_SOCKET_IFNAME": "^docker"}, ("ok", "eth0")),
    ],
)
def test_the_interface(interface, variables, expected):
    topology = Topology(STEP, 0, 2, interface=interface)
    check(check_interfaces(names(GOOD), topology, Variables(variables), own="n1"), *expected)


def test_no_way_to_another_host():
    outcome = names({**GOOD, "n2": (["10.0.0.2"], None)})
    finding = check_interfaces(outcome, TWO, Variables({}), own="n1")
    check(finding, "warning", "n2 is reached", "ip route get")
    assert "slurm" not in finding.fix
    assert "in slurm/site.sh" in check_interfaces(outcome, replace(TWO, slurm=SLURM), Variables({}), own="n1").fix


@pytest.mark.parametrize(
    ("text", "topology", "expected"),
    [
        ("32768 60999", TWO, ("ok", "20000-32767")),
        ("1024 65535", TWO, ("warning", "Linux gives the ports 1024-65535", "sysctl -w net.ipv4.ip_local_port_range")),
        ("32768 60999", Topology(), ("ok", "one process")),
        ("32768 60999", Topology(TFConfig(("a:2222", "b:2222")), 0, 2), ("ok", "2222, from TF_CONFIG")),
        (
            "32768 60999",
            Topology(TFConfig(("a:40000", "b:2")), 0, 2),
            ("warning", "40000, from TF_CONFIG", "below 32768"),
        ),
    ],
)
def test_ports(text, topology, expected, tmp_path):
    path = tmp_path / "sys/net/ipv4/ip_local_port_range"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    check(check_ports(tmp_path, topology), *expected)


def test_a_port_that_is_taken():
    message = "n1:2222: cannot listen there (Address already in use): another program has this port; end it"
    check(check_ports(Path("/proc"), TWO, problem=message), "error", "another program has this port", "end it")


def test_clocks():
    check(check_clocks({"rank 0": 100.0, "rank 1": 100.4}, most_s=2), "ok", "the same on all ranks")
    skewed = {"rank 0": 100.0, "rank 1 (n2)": 160.0, "rank 2": 100.1}
    check(check_clocks(skewed, most_s=2), "warning", "rank 1 (n2) is 60 s ahead", "chronyd")


# Data and folders


def data_of(*overrides):
    return compose_config(*overrides).data


@pytest.mark.parametrize(
    ("overrides", "outcome", "expected"),
    [
        (
            [],
            answered(dataset={"to_download": "/h/mnist.npz"}),
            ("warning", "would download it to /h/mnist.npz", "data=digits"),
        ),
        (["data=digits"], answered(dataset={"to_build": "/c/d.npz"}), ("ok", "would build them")),
        (
            ["data=mnist", "data.path=x.npz"],
            answered(dataset={"error": "data.path=x.npz: cannot be read: No such file"}),
            ("error", "data.path=x.npz: cannot be read", "correct this key"),
        ),
        (["data=mnist", "data.path=x.npz"], EXPIRED, ("error", "(x.npz): loading it did not answer", "data.path=")),
        (
            ["data=mnist"],
            answered(
                dataset={"name": "mnist", "sha256": "ab" * 32, "num_train": 60000, "num_test": 10000, "shape": [28, 28]}
            ),
            ("ok", "60,000 + 10,000 images of 28x28, sha256 abab"),
        ),
    ],
)
def test_the_data_set(overrides, outcome, expected):
    check(check_dataset(data_of(*overrides), outcome), *expected)


def test_pretrained_weights_are_looked_for(tmp_path):
    model = compose_config(f"model.pretrained='{tmp_path / 'model.keras'}'").model
    (found,) = check_pretrained(model)
    check(
        found, "error", f"model.pretrained={tmp_path / 'model.keras'}: no such file", "give the path of a model.keras"
    )
    (tmp_path / "model.keras").touch()
    assert check_pretrained(model) == []
    assert check_pretrained(compose_config().model) == []


VERDICTS = {"num_layers": 3, "num_parameters": 1234, "refused": "", "fast_only": "", "code": "ab" * 32}
FAST_ONLY = answered(started=True, verdicts={**VERDICTS, "fast_only": "mine (Mine): computes in Python"})


@pytest.mark.parametrize(
    ("outcome", "mode", "expected"),
    [
        (
            answered(started=True, verdicts=VERDICTS),
            "exact",
            ("ok", "net:build: 3 layers can be trained, 1,234 parameters"),
        ),
        (
            answered(started=True, verdicts={**VERDICTS, "refused": "mine (Mine): mixes"}),
            "fast",
            ("error", "net:build: cannot be trained: mine (Mine): mixes", "check_model"),
        ),
        (FAST_ONLY, "fast", ("warning", "needs reproducibility=fast: mine (Mine)", "reproducibility=fast")),
        (FAST_ONLY, "exact", ("error", "needs reproducibility=fast: mine (Mine)", "reproducibility=fast")),
        (
            answered(started=True, error="model.factory=net:build: returns a compiled model; leave out compile()"),
            "exact",
            ("error", "model.factory=net:build: returns a compiled model", "leave out compile()"),
        ),
        (
            answered(started=True, error="model.factory=net:build: fails: KeyError"),
            "exact",
            ("error", "net:build: fails: KeyError", "check_model"),
        ),
        (answered(no_images="data.path=x.npz: no such file"), "", ("unknown", "cannot be loaded: data.path=x.npz")),
        (EXPIRED, "", ("unknown", "TensorFlow's import did not answer within 30 s")),
        (
            Outcome(None, '["started", true]', "", 30),
            "exact",
            ("error", "building and trying it did not answer within 30 s", "timeout_s=300"),
        ),
    ],
)
def test_a_network_of_the_users_own(outcome, mode, expected):
    config = compose_config("model=keras", "model.factory=net:build").model
    check(check_own_model(config, outcome, mode=mode), *expected)


def test_ranks_whose_network_differs():
    config = compose_config("model=keras", "model.factory=net:build").model
    outcomes = [answered(started=True, verdicts={**VERDICTS, "code": code * 32}) for code in ("ab", "ab", "cd")]
    reports = [report(rank, check_own_model(config, one, mode="exact")) for rank, one in enumerate(outcomes)]
    (row,) = [row for row in merge(reports) if row.name == "network"]
    assert row.status == "error"
    (deviation,) = row.deviations
    assert (deviation.rank, "model.code=cdcdcdcdcdcd" in deviation.found) == (2, True)


FINE = {"problem": "", "seconds": 0.01}
FOLDER = {
    "path": "/scratch/run",
    "space": {"place": "/scratch", "free": 10**12, "free_files": 10**6},
    "write": FINE,
    "rename": FINE,
    "fsync_of_a_folder": FINE,
    "flock": FINE,
}
MOUNTS = "/dev/a / ext4 rw 0 0\nserver:/x /scratch nfs4 rw 0 0\nother /scratch2 lustre rw 0 0\n"


def folder_with(**changed) -> Outcome:
    return answered(**{**FOLDER, **changed})


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (folder_with(), ("ok", "/scratch/run (nfs4 at /scratch): 1 TB free")),
        (
            Outcome(None, '["path", "/scratch/run"]\n["spa', "", 5),
            ("error", "(nfs4 at /scratch): space did not answer within 5 s", "dmesg"),
        ),
        (
            folder_with(refused="run_dir=x: cannot be written: Read-only file system"),
            ("error", "Read-only", "run_dir on another"),
        ),
        (
            folder_with(refused="run_dir=x: is not a run folder; name another one"),
            ("error", "not a run folder", "name another"),
        ),
        (folder_with(space={**FOLDER["space"], "free": 10**6}), ("error", "needs about 50 MB", "remove files")),
        (folder_with(space={**FOLDER["space"], "free": 10**8}), ("warning", "100 MB free: little", "remove files")),
        (folder_with(space={**FOLDER["space"], "free_files": 0}), ("error", "inodes", "remove files")),
        (
            folder_with(write={**FINE, "problem": "Disk quota exceeded"}),
            ("error", "write: Disk quota exceeded", "quota -s"),
        ),
        (
            folder_with(flock={**FINE, "problem": "No locks available"}),
            ("warning", "two jobs could train", "Lustre: flock"),
        ),
    ],
)
def test_the_run_folder(outcome, expected):
    check(check_folder(outcome, MOUNTS), *expected)


def test_which_file_system():
    assert describe_mount("/scratch/a/b", MOUNTS) == "nfs4 at /scratch"
    assert describe_mount("/scratch2", MOUNTS) == "lustre at /scratch2"
    assert describe_mount("/home", MOUNTS) == "ext4 at /"


@pytest.mark.parametrize(
    ("answer", "topology", "expected"),
    [
        ("refused", ONE_OF_TWO, ("ok", "sees the lock")),
        ("granted", ONE_OF_TWO, ("warning", "two nodes could train in one folder", "localflock")),
        ("absent", ONE_OF_TWO, ("ok", "does not see rank 0's run folder")),
        ("absent", replace(ONE_OF_TWO, slurm=SLURM), ("warning", "may find no checkpoint", "that all nodes share")),
        ("absent", Topology(STEP, 1, 2), ("warning", "may find no checkpoint", "that all nodes share")),
        ("Input/output error", ONE_OF_TWO, ("unknown", "Input/output error")),
        (None, ONE_OF_TWO, ("unknown", "did not answer within 30 s")),
    ],
)
def test_the_lock_of_rank_0(answer, topology, expected):
    check(check_shared_lock(answer, EXPIRED, topology), *expected)


# What auto would choose

CHOICES = {
    "strategy": "single",
    "reason": "one process",
    "reproducibility": "exact",
    "precision": "float32",
    "compile": "none",
    "intra_op": 1,
    "inter_op": 4,
    "cores": 4,
    "num_gpus": 0,
    "num_shards": 8,
    "warnings": [],
}


def test_the_choices_and_their_reasons():
    rows = {row.name: row.found for row in check_choices(compose_config(), answered(choices=CHOICES))}
    assert rows["strategy"] == "single (one process)"
    assert rows["precision"] == "float32 (a CPU)"
    assert rows["reproducibility"] == "exact (CPUs, where it costs little)"
    assert rows["compiler"] == "none (XLA pays in fast mode on one GPU)"
    assert rows["threads"].startswith("4 operation(s) in parallel, 1 thread(s) in each (4 core(s), 8 shard(s)")


@pytest.mark.parametrize(
    ("num_gpus", "chosen"),
    [
        (0, ("single", "exact", "float32", "none")),
        (1, ("single", "fast", "mixed_bfloat16", "xla")),
        (2, ("mirrored", "fast", "mixed_bfloat16", "none")),
    ],
)
def test_the_choices_with_gpus(num_gpus, chosen):
    told = _choices(compose_config(), Topology(), [{"compute_capability": [9, 0]}] * num_gpus)
    assert tuple(told[key] for key in ("strategy", "reproducibility", "precision", "compile")) == chosen
    rows = {row.name: row.found for row in check_choices(compose_config(), answered(choices=told))}
    assert rows["compiler"].startswith(chosen[-1])


def test_a_strategy_that_does_not_match():
    told = {"error": "strategy=single: is for one process, but slurm started 2; give strategy=horovod", "warnings": []}
    (row,) = check_choices(compose_config(), answered(choices=told))
    check(row, "error", "is for one process", "give strategy=horovod")


def test_a_setting_without_effect():
    told = {**CHOICES, "warnings": ["WARNING: threads.intra_op=4 is ignored; more processes use more cores"]}
    row = check_choices(compose_config(), answered(choices=told))[-1]
    check(row, "warning", "threads.intra_op=4 is ignored", "more processes")


# Merging


def report(rank, *findings, clock_s=100.0) -> RankReport:
    return RankReport(rank, f"n{rank}", findings, clock_s)


def version(number, status="ok") -> Finding:
    return Finding("NumPy", status, number, facts={"version of numpy": number}, differing="warning")


def test_ranks_that_agree_make_one_row():
    rows = merge([report(0, version("2.4")), report(1, version("2.4"))])
    assert [(row.name, row.status, row.found, row.deviations) for row in rows[:1]] == [("NumPy", "ok", "2.4", ())]


def test_the_rank_that_differs_is_marked_with_its_host():
    row = merge([report(0, version("1.26")), report(1, version("2.4")), report(2, version("2.4"))])[0]
    assert (row.status, row.found) == ("warning", "2.4")
    (deviation,) = row.deviations
    assert (deviation.rank, deviation.host, deviation.status) == (0, "n0", "warning")
    assert deviation.found == "version of numpy=1.26, not 2.4"
    assert deviation.fix.startswith("give all ranks the same")


def test_keys_that_differ_are_named():
    configs = [check_configuration(compose_config(*words)) for words in ([], ["seed=7"], [])]
    row = merge([report(rank, finding) for rank, finding in enumerate(configs)])[0]
    assert (row.status, row.deviations[0].found) == ("error", "seed=7, not 0")


def test_code_that_differs_is_an_error():
    row = merge([report(0, check_code("1", "a" * 64)), report(1, check_code("1", "b" * 64))])[0]
    assert (row.status, row.deviations[0].rank) == ("error", 1)


def test_what_may_differ():
    memory = [Finding("memory", "ok", f"{number} GB") for number in (8, 16)]
    assert merge([report(0, memory[0]), report(1, memory[1])])[0].deviations == ()
    little = Finding("memory", "error", "0.1 GB", "--mem")
    row = merge([report(0, memory[0]), report(1, little), report(2, memory[1])])[0]
    assert (row.status, row.found) == ("error", "8 GB")
    assert [(one.rank, one.found, one.fix) for one in row.deviations] == [(1, "0.1 GB", "--mem")]


def test_a_gpu_that_two_ranks_use():
    gpus = [Finding("GPUs of this rank", "ok", "1 of 1", details={"uuids": ["GPU-aa"]}) for _ in range(2)]
    row = {row.name: row for row in merge([report(rank, one) for rank, one in enumerate(gpus)])}["GPUs of all ranks"]
    check(row, "error", "ranks 0 and 1 both use the GPU GPU-aa", "give each process its own GPU")


def test_a_report_travels_as_text():
    sent = report(3, version("2.4"), clock_s=1.5)
    assert RankReport.from_json(sent.to_json()) == sent


def test_the_verdict_and_its_json():
    rows = merge([report(0, version("2.4"), Finding("x", "unknown", "?")), report(1, version("1.26"))])
    assert verdict(rows) == "warning"
    assert summarize(rows).startswith("1 warning, 1 unknown, 2 ok: nothing stands in the way")
    told = json.loads(to_json(rows, [report(0), report(1)]))
    assert told["verdict"] == "warning"
    assert told["ranks"] == [{"rank": 0, "host": "n0"}, {"rank": 1, "host": "n1"}]
    assert told["rows"][0]["deviations"][0]["host"] == "n1"
