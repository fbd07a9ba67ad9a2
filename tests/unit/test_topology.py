import itertools
import json
import tracemalloc

import pytest

from mnist_dist.base.errors import UserError
from mnist_dist.launch.address import split_address
from mnist_dist.launch.environment import read_topology
from mnist_dist.launch.slurm import expand_node_list, expand_task_counts
from mnist_dist.launch.topology import Alone, HorovodRun, SlurmJob, Step, TFConfig, Topology


def tf_config(*addresses, index=0) -> dict[str, str]:
    content = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    return {"TF_CONFIG": json.dumps(content)}


def tf_config_of(cluster, task=None) -> dict[str, str]:
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": task or {"type": "worker", "index": 0}})}


HOROVOD = {
    "HOROVOD_RANK": "3",
    "HOROVOD_SIZE": "4",
    "HOROVOD_LOCAL_RANK": "1",
    "HOROVOD_LOCAL_SIZE": "2",
    "HOROVOD_GLOO_RENDEZVOUS_ADDR": "h",
    "HOROVOD_GLOO_RENDEZVOUS_PORT": "5",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NODELIST": "n[1-2],login",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}


def test_one_process():
    assert read_topology({}) == Topology()
    assert Topology().launcher == Alone()
    assert Topology().is_chief


def test_horovod():
    assert read_topology(HOROVOD) == Topology(HorovodRun("h:5"), rank=3, world_size=4, local_rank=1, local_size=2)


def test_horovod_inside_a_slurm_allocation():
    assert read_topology({**SLURM, **HOROVOD}).launcher == HorovodRun("h:5")


def test_tf_config():
    topology = read_topology(tf_config("a:1", "b:1", "a:2", index=2))
    assert (topology.rank, topology.world_size, topology.local_rank, topology.local_size) == (2, 3, 1, 2)
    assert topology.launcher == TFConfig(("a:1", "b:1", "a:2"))
    assert not topology.is_chief


def test_tf_config_with_a_chief():
    cluster = {"chief": ["a:1"], "worker": ["b:1"]}
    for task, rank in [({"type": "chief", "index": 0}, 0), ({"type": "worker", "index": 0}, 1)]:
        assert read_topology({"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})}).rank == rank


def read_slurm_step(**changed) -> Step:
    launcher = read_topology({**SLURM, **changed}).launcher
    assert isinstance(launcher, Step)
    return launcher


def test_slurm():
    topology = read_topology(SLURM)
    assert (topology.rank, topology.world_size, topology.local_rank, topology.local_size) == (4, 5, 0, 1)
    assert read_slurm_step().hosts == ("n1", "n1", "n2", "n2", "login")  # ports are chosen when needed
    assert topology.slurm == SlurmJob("77", "n[1-2],login")


def test_all_ranks_of_a_slurm_step_know_where_to_meet():
    first, last = (read_slurm_step(SLURM_PROCID=rank, SLURM_LOCALID=local) for rank, local in [("0", "0"), ("3", "1")])
    assert first.meeting_addresses == last.meeting_addresses
    assert first.step_id == last.step_id
    assert {address.split(":")[0] for address in first.meeting_addresses} == {"n1"}


def test_jobs_that_run_at_the_same_time_have_their_own_meeting_addresses():
    """Those of any thousand consecutive jobs, and of the steps of one job."""
    launchers = [read_slurm_step(SLURM_JOB_ID=str(job)) for job in range(5000, 5300)]
    launchers += [read_slurm_step(SLURM_STEP_ID=str(step)) for step in range(20)]
    firsts = [launcher.meeting_addresses[0] for launcher in launchers]
    assert len(set(firsts)) == len(firsts)


def test_a_requeued_job_does_not_mix_with_what_is_left_of_its_last_start():
    again = read_topology({**SLURM, "SLURM_RESTART_COUNT": "2"})
    assert read_slurm_step(SLURM_RESTART_COUNT="2").step_id != read_slurm_step().step_id
    assert again.slurm is not None
    assert again.slurm.restart_count == 2


def test_a_task_of_an_array_has_the_name_that_the_user_knows():
    topology = read_topology({**SLURM, "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"})
    assert topology.slurm is not None
    assert topology.slurm.job_id == "70_3"


def test_one_slurm_task_is_one_process():
    one = read_topology({**SLURM, "SLURM_STEP_NUM_TASKS": "1"})
    assert one == Topology(slurm=SlurmJob("77", "n[1-2],login"))


def test_a_machine_has_the_name_that_its_launcher_knows(monkeypatch):
    """By which it tells what was lost."""
    monkeypatch.setattr("socket.gethostname", lambda: "n2.cluster.example")
    step = {**SLURM, "SLURMD_NODENAME": "n2"}
    assert read_topology({**step, "SLURM_STEP_NUM_TASKS": "1"}).node_name() == "n2"
    assert read_topology(step).node_name() == "login"
    assert read_topology({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}).node_name() == "n2.cluster.example"
    assert read_topology({}).node_name() == "n2.cluster.example"


@pytest.mark.parametrize(
    ("environ", "fragments"),
    [
        ({**HOROVOD, **tf_config("a:1")}, ["HOROVOD_RANK=3", "TF_CONFIG=", "unset one"]),
        ({"HOROVOD_RANK": "0"}, ["HOROVOD_SIZE", "horovodrun"]),
        ({**HOROVOD, "HOROVOD_SIZE": "four"}, ["HOROVOD_SIZE=four", "whole number"]),
        ({**HOROVOD, "HOROVOD_RANK": "4"}, ["contradict each other"]),
        ({"TF_CONFIG": "{oops"}, ["TF_CONFIG={oops", "expected"]),
        ({"TF_CONFIG": "{}"}, ["TF_CONFIG={}", "expected"]),
        (tf_config(), ["there is no worker 0"]),
        (tf_config("a:1", "b:1", index=2), ["there is no worker 2"]),
        (tf_config("a:1", "b:1", index=-1), ["there is no worker -1"]),
        (tf_config("a:1", "a:1"), ["a:1 is not unique"]),
        (tf_config("a:1", "b"), ["b is not host:port"]),
        (tf_config("a:1", "b:x"), ["b:x is not host:port"]),
        (tf_config("a:1", 7), ["7 is not host:port"]),
        (
            {"TF_CONFIG": '{"cluster": {"worker": "a:1"}, "task": {"type": "worker", "index": 0}}'},
            ["not a list of host:port"],
        ),
        (
            {"TF_CONFIG": '{"cluster": {"worker": ["a:1"], "ps": ["b:1"]}, "task": {"type": "ps", "index": 0}}'},
            ["no parameter servers"],
        ),
        ({key: value for key, value in HOROVOD.items() if "ADDR" not in key}, ["HOROVOD_GLOO_RENDEZVOUS_ADDR"]),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, ["mpirun is not supported"]),
        ({**SLURM, "SLURM_LOCALID": "1"}, ["SLURM_LOCALID=1", "--distribution=block"]),
        ({**SLURM, "SLURM_STEP_NODELIST": "n1"}, ["SLURM_STEP_NODELIST=n1 names 1 nodes", "2(x2),1 3"]),
        ({"SLURM_STEP_NUM_TASKS": "2"}, ["SLURM_STEP_NUM_TASKS=2 is set but SLURM_STEP_NODELIST", "srun"]),
        ({"SLURM_PROCID": "1"}, ["SLURM_PROCID=1", "SLURM_STEP_NUM_TASKS is not set", "srun"]),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "6"}, ["SLURM_STEP_NUM_TASKS=6", "2(x2),1 means 5 tasks"]),
        ({**SLURM, "SLURM_PROCID": "5"}, ["SLURM_PROCID=5", "5 tasks"]),
        ({**HOROVOD, "HOROVOD_RANK": ""}, ["HOROVOD_SIZE=4 is set but HOROVOD_RANK is not"]),
        ({**HOROVOD, "HOROVOD_LOCAL_SIZE": "5"}, ["HOROVOD_LOCAL_SIZE=5", "contradict each other"]),
        ({**HOROVOD, "HOROVOD_CROSS_RANK": "2", "HOROVOD_CROSS_SIZE": "2"}, ["HOROVOD_CROSS_RANK=2", "contradict"]),
        ({**HOROVOD, "HOROVOD_GLOO_RENDEZVOUS_PORT": ""}, ["HOROVOD_GLOO_RENDEZVOUS_PORT is not"]),
        ({**HOROVOD, "HOROVOD_GLOO_RENDEZVOUS_ADDR": "a b"}, ["HOROVOD_GLOO_RENDEZVOUS_ADDR=a b", "not a host name"]),
        ({"TF_CONFIG": "[" * 100_000}, ["TF_CONFIG=[[[", "...: not usable"]),
        ({"TF_CONFIG": "[]"}, ["TF_CONFIG=[]", '"cluster" is missing']),
        ({"TF_CONFIG": "null"}, ["TF_CONFIG=null", '"cluster" is missing']),
        ({"TF_CONFIG": '{"cluster": 1, "task": 2}'}, ['"type" is missing']),
        (tf_config_of([]), ["only chief and worker"]),
        (tf_config_of({"worker": {"0": "a:1", "2": "b:1"}}), ["numbered from 0"]),
        (tf_config_of({"worker": None}), ["null is not a list of host:port"]),
        (tf_config_of({"worker": ["a:1"], "chief": ["A:1"]}), ["a:1 is not unique"]),
        (tf_config_of({"worker": ["a:1"]}, {"type": ["worker"], "index": 0}), ["only chief and worker"]),
        *(
            (tf_config("a:1", index=index), ["the index", "not a whole number"])
            for index in (True, 1.5, "x", None, 10**30)
        ),
    ],
)
def test_what_does_not_fit_is_refused(environ, fragments):
    with pytest.raises(UserError) as error:
        read_topology(environ)
    for fragment in fragments:
        assert fragment in str(error.value)
    assert len(str(error.value)) < 700


NUMBERS = (
    [(base, name) for base in (HOROVOD, SLURM) for name, value in base.items() if value.isdigit()]
    + [({}, name) for name in ("OMPI_COMM_WORLD_SIZE", "SLURM_CPUS_PER_TASK", "SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS")]
    + [
        (SLURM, name)
        for name in ("SLURM_CPUS_PER_TASK", "SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
    ]
    + [(HOROVOD, name) for name in ("HOROVOD_CROSS_RANK", "HOROVOD_CROSS_SIZE")]
)


@pytest.mark.parametrize("value", ["abc", "-1", "1.5", "1e3", "1_0", "\u0663", "99999999999", "9" * 100_000, "1\n2"])
@pytest.mark.parametrize(("base", "name"), NUMBERS)
def test_a_bad_number_is_named(base, name, value):
    with pytest.raises(UserError, match=f"^{name}=.*: must be a whole number from") as error:
        read_topology({**base, name: value})
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("value", ["", " "])
def test_empty_is_not_set(value):
    assert (
        read_topology({name: value for base in (HOROVOD, SLURM) for name in base} | {"TF_CONFIG": value}) == Topology()
    )
    assert read_topology({**SLURM, "SLURM_CPUS_PER_TASK": value, "SLURM_RESTART_COUNT": value, "TF_CONFIG": value}) == (
        read_topology(SLURM)
    )
    assert read_topology({"CUDA_VISIBLE_DEVICES": ""}).visible_gpus == ""  # no GPUs


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        *((f"a:{port}", "ports are 1 to 65535") for port in (0, 65_536, 99_999)),
        *((f"a:{port}", "not host:port") for port in ("", "-5", "+5", " 5", "5 ", "\u0663", "9" * 30)),
        *((host + ":5", "not a host name") for host in ("", " a", "a b", "a..b", "-a", "a" * 64, "a." * 150, "\u00fc")),
        *((host + ":5", "Expected 4") for host in ("1", "127.1", "0x7f.1")),
        ("300.0.0.1:5", "> 255"),
        ("::1:5", "IPv6 address needs brackets: [::1]:2345"),
        ("http://a:5", "not host:port"),
        ("[::1]", "not host:port"),
        ("[a]:5", "not an IPv6 address"),
        ("[]:5", "not an IPv6 address"),
        ("[::1::]:5", "not host:port"),
        ("[" + ":" * 100_000 + "]:5", "not host:port"),
        (None, "null is not host:port"),
        (["b:1"], "not host:port"),
    ],
)
def test_a_bad_address_is_named_wherever_it_is(address, reason):
    for addresses, index in itertools.product([("ok:1", address), (address, "ok:1")], (0, 1)):
        with pytest.raises(UserError, match=r"^TF_CONFIG=") as error:
            read_topology(tf_config(*addresses, index=index))
        assert reason in str(error.value)
        assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a:1", "A:1"),
        ("a:1", "a:01"),
        ("a:1", "a.:1"),
        ("[::1]:1", "[0:0:0:0:0:0:0:1]:1"),
        ("[fd00::a]:1", "[FD00:0::A]:1"),
        ("10.0.0.1:1", "[::ffff:10.0.0.1]:1"),
        *itertools.combinations(["localhost:1", "127.0.0.1:1", "127.0.0.2:1", "[::1]:1", "0.0.0.0:1"], 2),
    ],
)
def test_one_port_spelled_two_ways(first, second):
    with pytest.raises(UserError, match="is not unique"):
        read_topology(tf_config(first, second))


def test_ipv6():
    topology = read_topology(tf_config("[FD00::1]:1", "[fd00::2]:1", "[fd00:0::1]:2", index=2))
    assert topology.launcher == TFConfig(("[fd00::1]:1", "[fd00::2]:1", "[fd00::1]:2"))
    assert (topology.local_rank, topology.local_size) == (1, 2)
    assert split_address("[fe80::1%eth0]:5") == ("fe80::1%eth0", 5)
    for host in ("::1", "[::1]"):
        topology = read_topology({**HOROVOD, "HOROVOD_GLOO_RENDEZVOUS_ADDR": host})
        assert topology.launcher == HorovodRun("[::1]:5")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("SLURM_STEP_NODELIST", text)
            for text in (
                "a[1-99999999999]",
                "a[1-99999999]",
                "a[1-",
                "a[5-1]",
                "a[]",
                "a]",
                "a,,b",
                "a b",
                "1",
                "a..b[1-2]",
                "a[1-99999][1-99999]",
                "[1-99999]" * 13_000,
                "a[1-50000]" + "[1]" * 40_000,
                "[1]" * 40_000,
                "a[1-99999]," * 10_000 + "a",
                "[" * 130_000,
                "a[" + "0" * 100_000 + "1]",
                "x" * 100_000 + "[1-99999]",
            )
        ),
        *(
            ("SLURM_STEP_TASKS_PER_NODE", text)
            for text in (
                "2(x99999999999)",
                "99999999(x99999999)",
                "9" * 5_000,
                "1(x",
                "0(x2)",
                "1,,1",
                "1," * 60_000 + "1",
            )
        ),
    ],
)
@pytest.mark.timeout(60)  # expanding the list would take far longer
def test_what_would_be_a_huge_job_is_refused_at_once(name, value):
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"{name}=") as error:
        read_topology({**SLURM, name: value})
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()
    assert len(str(error.value)) < 500


@pytest.mark.timeout(60)  # comparing each with each would take far longer
def test_as_many_processes_as_a_variable_can_name():
    assert read_topology(tf_config(*[f"h{number}:1" for number in range(10_000)])).world_size == 10_000


def test_a_rank_is_described_by_its_place():
    assert read_topology(tf_config("a:1", "b:1")).describe_rank(1) == "rank 1 (b:1)"
    assert read_topology(SLURM).describe_rank(2) == "rank 2 (n2)"
    for topology in (Topology(), read_topology(HOROVOD)):
        assert topology.describe_rank(2) == "rank 2"
        assert topology.describe_rank(2, host="far") == "rank 2 (far)"


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("gpu[08-10]", ["gpu08", "gpu09", "gpu10"]),
        ("a[1-2,5],b,c[3]", ["a1", "a2", "a5", "b", "c3"]),
        ("rack-1n[1-2]-ib", ["rack-1n1-ib", "rack-1n2-ib"]),
        ("r[1-2]n[09-10],login", ["r1n09", "r1n10", "r2n09", "r2n10", "login"]),
        ("127.0.0.[1-2]", ["127.0.0.1", "127.0.0.2"]),
    ],
)
def test_expand_node_list(text, hosts):
    assert expand_node_list(text) == hosts


@pytest.mark.parametrize(("text", "counts"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,2(x2)", [1, 2, 2])])
def test_expand_task_counts(text, counts):
    assert expand_task_counts(text) == counts
