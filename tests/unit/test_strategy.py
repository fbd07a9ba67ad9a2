import pytest

from mnist_dist.base.errors import UserError
from mnist_dist.launch.interfaces import interface_towards
from mnist_dist.launch.topology import HorovodRun, SlurmJob, Step, TFConfig, Topology
from mnist_dist.strategy.choose import choose_strategy
from mnist_dist.strategy.horovod import describe_process

ONE = Topology()
HOROVOD = Topology(HorovodRun("h:5"), rank=1, world_size=2, local_rank=1, local_size=2)
HOROVOD_ALONE = Topology(HorovodRun())
SLURM = Topology(Step(("a", "b"), ("a:1",), "7.0.0"), rank=0, world_size=2, slurm=SlurmJob("7", "[a-b]"))
TF_CONFIG = Topology(TFConfig(("a:1", "b:1")), rank=0, world_size=2)


@pytest.mark.parametrize(
    ("topology", "num_gpus", "expected", "reason"),
    [
        (ONE, 0, "single", "CPU"),
        (ONE, 1, "single", "1 GPU"),
        (ONE, 2, "mirrored", "2 GPUs"),
        (HOROVOD, 0, "horovod", "HOROVOD_RANK"),
        (HOROVOD, 8, "horovod", "HOROVOD_RANK"),
        (HOROVOD_ALONE, 0, "horovod", "HOROVOD_RANK"),
        (TF_CONFIG, 0, "multiworker", "2 processes"),
        (TF_CONFIG, 8, "multiworker", "2 processes"),
    ],
)
def test_auto(topology, num_gpus, expected, reason):
    name, why = choose_strategy("auto", topology, num_gpus=num_gpus, has_horovod=True)
    assert name == expected
    assert reason in why


@pytest.mark.parametrize(
    ("has_horovod", "expected", "reason"),
    [(True, "horovod", "and Horovod is installed"), (False, "multiworker", "and Horovod is not installed")],
)
def test_auto_under_slurm(has_horovod, expected, reason):
    name, why = choose_strategy("auto", SLURM, num_gpus=0, has_horovod=has_horovod)
    assert (name, why) == (expected, f"2 processes were started by slurm, {reason}")


@pytest.mark.parametrize("name", ["single", "mirrored", "multiworker", "horovod"])
def test_what_is_configured_is_taken(name):
    assert choose_strategy(name, ONE, num_gpus=0, has_horovod=False)[0] == name


@pytest.mark.parametrize("name", ["multiworker", "horovod"])
def test_slurm_starts_either(name):
    assert choose_strategy(name, SLURM, num_gpus=0, has_horovod=True)[0] == name


@pytest.mark.parametrize(
    ("name", "topology", "fragments"),
    [
        ("single", HOROVOD, ["strategy=single", "horovod started 2", "strategy=horovod"]),
        ("mirrored", TF_CONFIG, ["strategy=mirrored", "tf_config started 2"]),
        ("mirrored", SLURM, ["strategy=mirrored", "slurm started 2", "slurm/train.sh", "#SBATCH --nodes=1"]),
        ("multiworker", HOROVOD, ["strategy=multiworker", "TF_CONFIG"]),
        ("horovod", TF_CONFIG, ["strategy=horovod", "horovodrun"]),
    ],
)
def test_what_does_not_fit_is_refused(name, topology, fragments):
    with pytest.raises(UserError) as error:
        choose_strategy(name, topology, num_gpus=0, has_horovod=True)
    for fragment in fragments:
        assert fragment in str(error.value)


def test_what_horovod_is_given_under_slurm():
    """Three nodes with 2, 1 and 2 processes: two nodes have a second process."""
    hosts = ("a", "a", "b", "c", "c")
    launcher = Step(hosts, ("a:1",), "7.0.0")
    topologies = [Topology.of_hosts(launcher, hosts, rank=rank) for rank in range(5)]
    places = [(topology.rank, topology.local_rank, topology.local_size) for topology in topologies]
    assert places == [(0, 0, 2), (1, 1, 2), (2, 0, 1), (3, 0, 2), (4, 1, 2)]
    told = [describe_process(topology, hosts) for topology in topologies]
    assert [(one["HOROVOD_CROSS_RANK"], one["HOROVOD_CROSS_SIZE"]) for one in told] == [
        ("0", "3"),
        ("0", "2"),
        ("1", "3"),
        ("2", "3"),
        ("1", "2"),
    ]
    assert [one["HOROVOD_RANK"] for one in told] == ["0", "1", "2", "3", "4"]
    assert told[4]["HOROVOD_HOSTNAME"] == "c"


def test_the_interface_towards_this_machine_is_the_loopback():
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("not an address") is None
