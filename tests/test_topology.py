import json

import pytest

from mnist_dist.errors import UserError
from mnist_dist.topology import SlurmJob, Topology, expand_node_list, expand_task_counts, read_topology


def tf_config(*addresses: str, index: int = 0) -> dict[str, str]:
    content = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    return {"TF_CONFIG": json.dumps(content)}


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
    assert Topology().is_chief


def test_horovod():
    assert read_topology(HOROVOD) == Topology("horovod", rank=3, world_size=4, local_rank=1, local_size=2, store="h:5")


def test_horovod_inside_a_slurm_allocation():
    assert read_topology({**SLURM, **HOROVOD}).launcher == "horovod"


def test_tf_config():
    topology = read_topology(tf_config("a:1", "b:1", "a:2", index=2))
    assert (topology.rank, topology.world_size, topology.local_rank, topology.local_size) == (2, 3, 1, 2)
    assert topology.addresses == ("a:1", "b:1", "a:2")
    assert not topology.is_chief


def test_tf_config_with_a_chief():
    cluster = {"chief": ["a:1"], "worker": ["b:1"]}
    for task, rank in [({"type": "chief", "index": 0}, 0), ({"type": "worker", "index": 0}, 1)]:
        assert read_topology({"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})}).rank == rank


def test_slurm():
    topology = read_topology(SLURM)
    assert (topology.rank, topology.world_size, topology.local_rank, topology.local_size) == (4, 5, 0, 1)
    assert topology.hosts == ("n1", "n1", "n2", "n2", "login")
    assert topology.addresses == ()  # ports are chosen when they are needed
    assert topology.slurm == SlurmJob("77", "n[1-2],login")


def test_all_ranks_of_a_slurm_step_know_where_to_meet():
    first, last = (
        read_topology({**SLURM, "SLURM_PROCID": rank, "SLURM_LOCALID": local})
        for rank, local in [("0", "0"), ("3", "1")]
    )
    assert first.contacts == last.contacts
    assert first.step == last.step
    assert {contact.split(":")[0] for contact in first.contacts} == {"n1"}


def test_jobs_that_run_at_one_time_have_contacts_of_their_own():
    """Of any thousand jobs after each other, and of the steps of one."""
    environs = [{**SLURM, "SLURM_JOB_ID": str(job)} for job in range(5000, 5300)]
    environs += [{**SLURM, "SLURM_STEP_ID": str(step)} for step in range(20)]
    firsts = [read_topology(environ).contacts[0] for environ in environs]
    assert len(set(firsts)) == len(firsts)


def test_a_requeued_job_does_not_mix_with_what_is_left_of_itself():
    again = read_topology({**SLURM, "SLURM_RESTART_COUNT": "2"})
    assert again.step != read_topology(SLURM).step
    assert again.slurm is not None
    assert again.slurm.restart_count == 2


def test_a_task_of_an_array_has_the_name_that_the_user_knows():
    topology = read_topology({**SLURM, "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"})
    assert topology.slurm is not None
    assert topology.slurm.job_id == "70_3"


def test_one_slurm_task_is_one_process():
    one = read_topology({**SLURM, "SLURM_STEP_NUM_TASKS": "1"})
    assert one == Topology(slurm=SlurmJob("77", "n[1-2],login"))


@pytest.mark.parametrize(
    ("environ", "fragments"),
    [
        ({**HOROVOD, **tf_config("a:1")}, ["HOROVOD_RANK=3", "TF_CONFIG=", "unset one"]),
        ({"HOROVOD_RANK": "0"}, ["HOROVOD_SIZE", "horovodrun"]),
        ({**HOROVOD, "HOROVOD_SIZE": "four"}, ["HOROVOD_SIZE=four", "whole numbers"]),
        ({**HOROVOD, "HOROVOD_RANK": "4"}, ["do not fit together"]),
        ({"TF_CONFIG": "{oops"}, ["TF_CONFIG={oops", "expected"]),
        ({"TF_CONFIG": "{}"}, ["TF_CONFIG={}", "expected"]),
        (tf_config(), ["there is no worker 0"]),
        (tf_config("a:1", "b:1", index=2), ["there is no worker 2"]),
        (tf_config("a:1", "b:1", index=-1), ["there is no worker -1"]),
        (tf_config("a:1", "a:1"), ["a:1 is no host:port of its own"]),
        (tf_config("a:1", "b"), ["b is no host:port"]),
        (tf_config("a:1", "b:x"), ["b:x is no host:port"]),
        (tf_config("a:1", 7), ["7 is no host:port"]),
        ({"TF_CONFIG": '{"cluster": {"worker": "a:1"}, "task": {"type": "worker", "index": 0}}'}, ["no host:port"]),
        (
            {"TF_CONFIG": '{"cluster": {"worker": ["a:1"], "ps": ["b:1"]}, "task": {"type": "ps", "index": 0}}'},
            ["no parameter servers"],
        ),
        ({key: value for key, value in HOROVOD.items() if "ADDR" not in key}, ["HOROVOD_GLOO_RENDEZVOUS_ADDR"]),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, ["mpirun is not supported"]),
        ({**SLURM, "SLURM_LOCALID": "1"}, ["SLURM_LOCALID=1", "--distribution=block"]),
        ({**SLURM, "SLURM_STEP_NODELIST": "n1"}, ["SLURM_STEP_NODELIST=n1 names 1 nodes", "2(x2),1 3"]),
        ({"SLURM_STEP_NUM_TASKS": "2"}, ["Slurm's variables are not complete"]),
    ],
)
def test_what_does_not_fit_is_refused(environ, fragments):
    with pytest.raises(UserError) as error:
        read_topology(environ)
    for fragment in fragments:
        assert fragment in str(error.value)


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
