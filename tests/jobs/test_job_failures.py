"""What goes wrong with jobs of several processes, each case for real: one clear line, exit code 2."""

import json
import shutil
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support import CHECKOUT
from support.job import DOCTOR_HINT, SINGLE, TRAIN, Job, wait_for_epoch
from support.launchers import free_ports, horovodrun, local_addresses, tf_config
from support.processes import wait_until
from support.runs import history_of, result_of


@pytest.fixture
def args(small_npz, tmp_path):
    return ["data=npz", f"data.path={small_npz}", "trainer.epochs=1", f"run_dir={tmp_path / 'run'}"]


def check_line(result, *fragments: str, prefix: str = "") -> None:
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"{prefix}error: ")
    for fragment in fragments:
        assert fragment in line


def test_more_replicas_than_examples_in_a_batch(args, run_python, tmp_path):
    result = run_python(*TRAIN, *args, "strategy=mirrored", "strategy.num_replicas=4", "batch.global_size=3")
    check_line(result, "batch.global_size=3", "4 replicas")
    assert not (tmp_path / "run").exists()


def test_more_replicas_than_shards(args, run_python, tmp_path):
    mirrored = ("strategy=mirrored", "strategy.num_replicas=4", "batch.num_shards=2")
    result = run_python(*TRAIN, *args, *mirrored, "reproducibility=exact")
    check_line(result, "batch.num_shards=2", "4 replicas", "give batch.num_shards=4", "or reproducibility=fast")
    assert not (tmp_path / "run").exists()


def test_replicas_are_only_for_mirrored(args, run_python):
    check_line(
        run_python(*TRAIN, *args, "strategy=single", "strategy.num_replicas=2"), "strategy.num_replicas=2", "mirrored"
    )


def test_variables_of_two_launchers(args, run_python):
    config = {"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}
    env = {"HOROVOD_RANK": "0", "TF_CONFIG": json.dumps(config)}
    check_line(run_python(*TRAIN, *args, env=env), "HOROVOD_RANK=0", "TF_CONFIG", "unset one")


def test_ranks_with_different_configurations(args, run_job, tmp_path):
    results = run_job(("multiworker", 2), *args, per_rank={1: ["seed=7", "model.dropout=0.1"]})
    fragment = "rank 1 has model.dropout=0.1, rank 0 has model.dropout=0.4"
    check_line(results[0], fragment)
    check_line(results[1], fragment, prefix="[rank 1/2] ")
    assert not (tmp_path / "run").exists()


def test_ranks_with_different_data(args, small_arrays, run_job, tmp_path):
    other = tmp_path / "other.npz"
    np.savez(other, **{**small_arrays, "y_test": small_arrays["y_test"][::-1]})
    results = run_job(("multiworker", 2), *args, per_rank={1: [f"data.path={other}"]})
    check_line(results[0], "rank 1 has data.sha256=")
    check_line(results[1], "rank 1 has data.sha256=", prefix="[rank 1/2] ")


def test_a_rank_that_cannot_take_part_is_named_to_all(args, run_job, tmp_path):
    results = run_job(("multiworker", 2), *args, per_rank={1: ["data.path=nowhere.npz"]})
    reason = "data.path=nowhere.npz: cannot be read: No such file or directory"
    check_line(results[0], f"rank 1 cannot take part: {reason}")
    check_line(results[1], reason, prefix="[rank 1/2] ")
    assert not (tmp_path / "run").exists()


# A rank that sees other GPUs than the rest, as if on another machine.
FEWER_GPUS = """
from mnist_dist import train
from mnist_dist.launch import gpus
from mnist_dist.launch.environment import read_topology

uuids = ["GPU-a", "GPU-b"] if read_topology().rank == 1 else []
gpus.query_gpus = lambda field: uuids
train.main()
"""


def test_a_rank_with_fewer_gpus_than_processes_is_named_to_all(args, run_job, tmp_path):
    results = run_job(("multiworker", 3), *args, script=["-c", FEWER_GPUS])
    reason = "3 processes on this machine but 2 GPUs"
    check_line(results[0], f"rank 1 cannot take part: {reason}")
    check_line(results[1], reason, prefix="[rank 1/3] ")
    check_line(results[2], f"rank 1 cannot take part: {reason}", prefix="[rank 2/3] ")
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_stops_all(args, run_job):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        results = run_job(("multiworker", 2), *args, ports={1: port})
    check_line(results[0], f"rank 1 cannot take part: 127.0.0.1:{port}: cannot listen there")
    check_line(results[1], f"127.0.0.1:{port}: cannot listen there", prefix="[rank 1/2] ")


# Takes the port of this process's server at the last moment, from inside: other programs have no chance to.
LOSE_PORT = """
import contextlib, socket
from mnist_dist import train
from mnist_dist.launch import rendezvous

share = rendezvous.share_port
def lose(server):
    share(server)
    port = server.getsockname()[1]
    server.close()
    while not taken:
        with contextlib.suppress(OSError):  # whoever still waits at it has to wake up first
            taken.append(socket.create_server(("", port)))
taken = []
rendezvous.share_port = lose
train.main()
"""


def test_a_port_that_is_lost_at_the_last_moment(args, start, tmp_path):
    """Despite everything that holds it: still only one line, though TensorFlow writes many."""
    results = start(("multiworker", 2), *args, script=["-c", LOSE_PORT]).wait(120)
    assert [result.returncode for result in results] == [2, 2]
    errors = [result.stderr for result in results]
    assert all(len(text.splitlines()) == 1 for text in errors), errors
    assert all("TensorFlow's server cannot listen there, on the port of rank" in text for text in errors), errors
    assert not (tmp_path / "run").exists()


GREEDY = """
import socket, sys
while True:
    try:
        server = socket.create_server(("", int(sys.argv[1])))
    except OSError:
        continue
    print("got it", flush=True)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_nobody_gets_a_port_between_the_check_and_tensorflows_server(rank, args, start, start_python, tmp_path):
    """A program keeps trying to; the job trains as if it were not there."""
    port = free_ports(1)[0]
    start(("multiworker", 2), *args, "trainer.epochs=300", ports={rank: port})
    wait_until(lambda: is_in_use(port))
    greedy = start_python("-c", GREEDY, port)
    wait_until((tmp_path / "run" / "history.csv").exists)
    greedy.kill()
    assert "got it" not in greedy.output()


def is_in_use(port) -> bool:
    try:
        socket.create_server(("", port)).close()
    except OSError:
        return True
    return False


@pytest.fixture
def start_ranks(start_python, args):
    """Start the ranks of a job at these addresses, one by one."""

    def begin(rank, addresses, *more) -> Job:
        return start_python(*TRAIN, "strategy=multiworker", *args, *more, env=tf_config(addresses)[rank])

    return begin


@pytest.mark.parametrize("rank", [0, 1])
def test_a_spare_process(rank, args, start_ranks, run_python, tmp_path):
    """It ends at once without waiting for anybody; the job does not notice it."""
    ports = free_ports(2)
    addresses = [f"127.0.0.1:{port}" for port in ports]
    job = [start_ranks(rank, addresses)]
    wait_until(lambda: is_in_use(ports[rank]))
    result = run_python(*TRAIN, *args, env=tf_config(addresses)[rank], timeout=30)
    check_line(result, f"rank {rank} is taken: ", prefix="[rank 1/2] " if rank else "")
    job.append(start_ranks(1 - rank, addresses))
    assert [one.codes() for one in job] == [[0], [0]]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_spare_process_while_the_job_trains(rank, args, start_ranks, run_python, tmp_path):
    addresses = local_addresses(2)
    job = [start_ranks(rank, addresses, "trainer.epochs=100000") for rank in (0, 1)]
    wait_for_epoch(job[0], tmp_path / "run", 1)
    result = run_python(*TRAIN, *args, env=tf_config(addresses)[rank], timeout=30)
    check_line(result, f"rank {rank} is taken: ", prefix="[rank 1/2] " if rank else "")
    wait_for_epoch(job[0], tmp_path / "run", len(history_of(tmp_path / "run").epochs) + 2)
    assert all(one.is_running() for one in job)


@pytest.fixture(scope="module")
def alone(small_npz, run_job, tmp_path_factory):
    """What the same training run gives on one device."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    (result,) = run_job(SINGLE, "data=npz", f"data.path={small_npz}", "trainer.epochs=1", f"run_dir={folder}")
    assert result.returncode == 0, result.stderr
    return result_of(folder)


@pytest.mark.parametrize("hosts", [("[::1]", "[::1]"), ("[::1]", "localhost"), ("localhost", "[::1]")])
def test_a_job_over_ipv6(hosts, start_ranks, alone, tmp_path):
    addresses = [f"{host}:{port}" for host, port in zip(hosts, free_ports(2), strict=True)]
    job = [start_ranks(rank, addresses) for rank in (0, 1)]
    assert [one.codes() for one in job] == [[0], [0]]
    assert result_of(tmp_path / "run") == alone


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SLURM_STEP_NUM_TASKS", "abc"),
        ("OMPI_COMM_WORLD_SIZE", "abc"),
        ("HOROVOD_SIZE", "2"),
        ("TF_CONFIG", "[1"),
        ("SLURM_JOB_ID", "x\ny"),
    ],
)
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_broken_variable_of_a_launcher(command, variable, value, args, run_python):
    result = run_python("-m", f"mnist_dist.{command}", f"run_dir={args[-1].partition('=')[2]}", env={variable: value})
    check_line(result, f"{variable}={value[:1]}")


def test_empty_variables_of_launchers(args, run_python):
    names = (
        "SLURM_STEP_NUM_TASKS",
        "OMPI_COMM_WORLD_SIZE",
        "HOROVOD_RANK",
        "HOROVOD_SIZE",
        "TF_CONFIG",
        "SLURM_JOB_ID",
    )
    result = run_python(*TRAIN, *args, env=dict.fromkeys(names, ""))
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HOROVOD_CYCLE_TIME", "abc"),
        ("HOROVOD_CACHE_CAPACITY", "-5"),
        ("HOROVOD_GLOO_TIMEOUT_SECONDS", "inf"),
        ("HOROVOD_GLOO_IFACE", "nonsense"),
    ],
)
def test_settings_of_horovod_that_would_make_it_fail(variable, value, args, run_python, tmp_path):
    horovodrun()
    check_line(run_python(*TRAIN, *args, "strategy=horovod", env={variable: value}), f"{variable}={value}: ")
    assert not (tmp_path / "run").exists()


def test_settings_of_horovod_that_do_not_matter(args, run_python):
    horovodrun()
    env = {
        "HOROVOD_CONTROLLER": "abc",
        "HOROVOD_CPU_OPERATIONS": "",
        "HOROVOD_CYCLE_TIME": "",
        "HOROVOD_GLOO_IFACE": " ",
    }
    result = run_python(*TRAIN, *args, "strategy=horovod", env=env)
    assert result.returncode == 0, result.stderr


def test_a_refusal_ends_a_horovod_job(args, run_job, tmp_path):
    """The chief refuses the folder; the other rank does not continue (horovodrun may end it before it says why)."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "somebody's file").touch()
    (result,) = run_job(("horovod", 2), *args)
    assert result.returncode == 1  # horovodrun's own, whatever exit codes its processes have
    output = result.stdout + result.stderr
    assert "error: run_dir=" in output
    assert "this folder is not empty" in output


def test_a_bug_is_reported_with_its_rank(args, run_python):
    code = "from mnist_dist import train; train.read_input = lambda *_: 1 / 0; train.main()"
    task = {"cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]}, "task": {"type": "worker", "index": 1}}
    result = run_python("-c", code, *args, env={"TF_CONFIG": json.dumps(task)})
    assert result.returncode == 1
    assert result.stderr.startswith("[rank 1/2] error: unexpected failure, please report it")
    assert "Traceback (most recent call last):" in result.stderr
    assert result.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_process_that_never_comes(args, run_python):
    ports = free_ports(2)
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    for index, missing in ((0, f"rank 1 (127.0.0.1:{ports[1]})"), (1, f"rank 0 (127.0.0.1:{ports[0]})")):
        env = {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})}
        result = run_python(*TRAIN, *args, "strategy.start_timeout_s=2", env=env)
        check_line(result, f"{missing} did not come within 2 s", DOCTOR_HINT, prefix="[rank 1/2] " if index else "")


def test_a_strategy_for_one_process_with_two(args, run_job):
    for result in run_job(("multiworker", 2), *args, "strategy=mirrored"):
        assert result.returncode == 2
        assert "strategy=mirrored: is for one process, but tf_config started 2" in result.stderr


def test_mpirun_would_train_n_times(args, run_python):
    check_line(run_python(*TRAIN, *args, env={"OMPI_COMM_WORLD_SIZE": "2"}), "OMPI_COMM_WORLD_SIZE=2", "horovodrun")


def test_horovod_is_not_installed(args, run_python):
    code = "import sys; sys.modules['horovod'] = None; from mnist_dist.train import main; main()"
    check_line(run_python("-c", code, *args, "strategy=horovod"), "strategy=horovod", "not installed", "make horovod")


def test_horovod_was_built_for_another_tensorflow(args, run_python, tmp_path):
    """Its library needs a symbol that the installed TensorFlow lacks."""
    installed = Path(horovodrun()).parent.parent / "lib"
    (package,) = installed.glob("python*/site-packages/horovod")
    shutil.copytree(package, tmp_path / "horovod")
    (library,) = (tmp_path / "horovod" / "tensorflow").glob("mpi_lib*.so")
    source = tmp_path / "other.c"
    source.write_text("int of_another_tensorflow(void); int call(void) { return of_another_tensorflow(); }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    result = run_python(*TRAIN, *args, "strategy=horovod", env={"PYTHONPATH": f"{tmp_path}:{CHECKOUT}"}, fresh=True)
    check_line(result, "not built for the installed TensorFlow", "of_another_tensorflow", "make horovod")
