"""What the launcher reads and tells, and what the ends of its processes mean."""

import pytest

from mnist_dist.base.errors import UserError
from mnist_dist.launch.__main__ import plan
from mnist_dist.launch.ends import End, judge
from mnist_dist.launch.environment import read_topology
from mnist_dist.launch.hosts import format_hosts, is_here, parse_hosts
from mnist_dist.launch.supervised import describe_rank
from mnist_dist.launch.topology import SlurmJob, Step

HOSTS = ["a", "a", "b"]


def variables(rank=0, *, start=0) -> dict[str, str]:
    return describe_rank(rank, HOSTS, job=77, start=start)


def test_a_rank_finds_its_place():
    topologies = [read_topology(variables(rank)) for rank in range(3)]
    assert [(one.rank, one.world_size, one.local_rank, one.local_size) for one in topologies] == [
        (0, 3, 0, 2),
        (1, 3, 1, 2),
        (2, 3, 0, 1),
    ]
    launchers = [one.launcher for one in topologies]
    assert launchers[0] == launchers[1] == launchers[2]
    assert isinstance(launchers[0], Step)
    assert launchers[0].hosts == ("a", "a", "b")
    assert launchers[0].name == "mnist_dist.launch"
    assert {address.split(":")[0] for address in launchers[0].meeting_addresses} == {"a"}


def test_a_start_does_not_mix_with_what_is_left_of_the_last_one():
    first, second = (read_topology(variables(start=start)).launcher for start in (0, 1))
    assert first.step_id != second.step_id
    assert first.meeting_addresses[0] != second.meeting_addresses[0]


def test_in_an_allocation_of_slurm_the_cores_of_its_one_task_are_for_all():
    slurm = {"SLURM_JOB_ID": "5", "SLURM_PROCID": "0", "SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_NODELIST": "n1"}
    topology = read_topology({**slurm, **variables(1)})
    assert (topology.rank, topology.world_size, topology.cpus_per_task) == (1, 3, None)
    assert topology.slurm == SlurmJob("5", "n1")


@pytest.mark.parametrize(
    ("environ", "fragments"),
    [
        ({**variables(), "TF_CONFIG": "{}"}, ["MNIST_DIST_RANK=0", "TF_CONFIG", "two launchers", "unset one"]),
        ({**variables(), "HOROVOD_RANK": "0"}, ["MNIST_DIST_RANK=0", "HOROVOD_RANK=0", "two launchers"]),
        ({"MNIST_DIST_RANK": "0"}, ["MNIST_DIST_RANK=0 is set but MNIST_DIST_HOSTS, ", "python -m mnist_dist.launch"]),
        ({**variables(), "MNIST_DIST_RANK": "3"}, ["MNIST_DIST_RANK=3", "a:2,b:1 means 3 processes"]),
        ({**variables(), "MNIST_DIST_HOSTS": "a:x"}, ["MNIST_DIST_HOSTS=a:x", "is not host:slots"]),
        *(
            ({**variables(), name: value}, [f"{name}={value}: must be a whole number"])
            for name in ("MNIST_DIST_RANK", "MNIST_DIST_JOB", "MNIST_DIST_START")
            for value in ("x", "-1", "1.5", "99999999999")
        ),
    ],
)
def test_variables_that_do_not_fit(environ, fragments):
    with pytest.raises(UserError) as error:
        read_topology(environ)
    for fragment in fragments:
        assert fragment in str(error.value)


def test_hosts():
    assert parse_hosts("a:2,B.c:1,127.0.0.2") == {"a": 2, "b.c": 1, "127.0.0.2": 1}
    assert parse_hosts("a,b") == {"a": 1, "b": 1}
    assert format_hosts(HOSTS) == "a:2,b:1"
    assert parse_hosts(format_hosts(HOSTS)) == {"a": 2, "b": 1}
    assert is_here("localhost")
    assert is_here("127.0.0.1")
    assert not is_here("127.0.0.2")
    assert not is_here("no-such-host.invalid")


@pytest.mark.parametrize(
    "text", ["", ":2", "a:", "a:0", "a:x", "a:-1", "a:1:1", "a,,b", "a b:1", "-a:1", "a@b:1", "a,A"]
)
def test_what_is_not_a_list_of_hosts(text):
    with pytest.raises(ValueError, match=r"."):
        parse_hosts(text)


def test_too_many_slots():
    with pytest.raises(ValueError, match="more than"):
        parse_hosts("a:99999,b:99999")


def outcome(*codes, num_processes=None):
    ends = [End(f"rank {number}", code) for number, code in enumerate(codes)]
    found = judge(ends, num_processes=num_processes or len(codes))
    return found.code, found.is_loss


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ((0, 0), 0),
        ((75, 75), 75),
        ((75, 0), 75),
        ((130, 75), 130),
        ((76, 76), 76),
        ((76, 75, 0), 76),
        ((137, 76, 76), 76),  # killed
        ((143, 75), 76),  # by somebody else
        ((255, 76), 76),  # ssh
        ((137, 2, 1), 76),  # others fail because of it
        ((2, 76), 2),
        ((76, 1), 1),  # the cause may be noticed late
        ((1, 134), 1),  # a library of another one aborts
        ((134, 1), 76),
        ((127,), 1),
    ],
)
def test_the_cause_counts(codes, code):
    assert outcome(*codes) == (code, code == 76)


def test_a_process_that_was_ended_from_here_says_nothing_by_itself():
    assert outcome(1, num_processes=2) == (1, False)
    assert outcome(0, num_processes=2) == (76, True)


def test_an_end_in_words():
    assert End("rank 1 (a)", 137).describe() == "rank 1 (a) was killed by SIGKILL"
    assert End("rank 1 (a)", 255).describe() == "rank 1 (a): ssh has lost it"
    assert End("rank 1 (a)", 250).describe() == "rank 1 (a) was killed by signal 122"
    assert End("rank 1 (a)", 2).describe() == "rank 1 (a) ended with exit code 2"


def test_a_plan():
    found = plan(
        ["-np", "3", "-H", "a:2,b:2", "--min-np", "2", "train", "strategy=horovod", "run_dir='x y/z'", "-cn", "n"]
    )
    assert found.slots == {"a": 2, "b": 2}
    assert (found.num_processes, found.min_processes, str(found.run_dir)) == (3, 2, "x y/z")
    assert found.words == ("-m", "mnist_dist.train", "strategy=horovod", "run_dir='x y/z'", "-cn", "n")
    assert found.command.startswith("python -m mnist_dist.launch -np 3 -H a:2,b:2 --min-np 2 train strategy=horovod ")


def test_without_a_run_folder_there_is_a_new_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = plan(["-H", "a:2,b:2", "train", "seed=1"])
    assert found.num_processes == 4
    assert found.words[2:] == ("seed=1", f"run_dir={found.run_dir}")
    assert found.command.endswith(f" train seed=1 run_dir={found.run_dir}")
    assert list(tmp_path.iterdir()) == []
    found.run_dir.mkdir(parents=True)
    names = {plan(["-np", "1", "train"]).run_dir for _ in range(3)}
    assert found.run_dir not in names
    assert plan(["-np", "1", "train", "run_dir=null"]).words[-1].startswith("run_dir=runs/")
    assert plan(["-np", "1", "doctor"]).words == ("-m", "mnist_dist.doctor")


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        ("train", "-np: say how many"),
        ("-np 0 train", "-np 0: must be from 1"),
        ("-np 4 -H a:2,b:1 train", "-np 4: must be from 1 to 3"),
        ("-np 2 --min-np 3 train", "--min-np 3: must be from 1 to 2"),
        ("-H a:x train", "-H a:x: a:x is not host:slots"),
        ("-H localhost:1,b:1 train", "-H: localhost is each host's own name for itself"),
        ("-H b:1,127.0.0.1:1 train", "-H: 127.0.0.1 is"),
        ("-np 2 --ssh ' train", "--ssh=': not a command (No closing quotation)"),
        ("-np 2 evaluate", "evaluate"),
        ("-np 2", "command"),
        ("-np 2 --oops train", "--oops"),
    ],
)
def test_a_wrong_plan(words, fragment):
    with pytest.raises(UserError) as error:
        plan(words.split())
    assert fragment in str(error.value)
