import pytest

from mnist_dist.errors import UserError
from mnist_dist.strategy import choose_strategy
from mnist_dist.topology import Topology

ONE = Topology()
HOROVOD = Topology("horovod", rank=1, world_size=2, local_rank=1, local_size=2)
HOROVOD_ALONE = Topology("horovod")
TF_CONFIG = Topology("tf_config", rank=0, world_size=2, addresses=("a:1", "b:1"))


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
    name, why = choose_strategy("auto", topology, num_gpus=num_gpus)
    assert name == expected
    assert reason in why


@pytest.mark.parametrize("name", ["single", "mirrored", "multiworker", "horovod"])
def test_what_is_configured_is_taken(name):
    assert choose_strategy(name, ONE, num_gpus=0)[0] == name


@pytest.mark.parametrize(
    ("name", "topology", "fragments"),
    [
        ("single", HOROVOD, ["strategy=single", "horovod started 2", "strategy=horovod"]),
        ("mirrored", TF_CONFIG, ["strategy=mirrored", "tf_config started 2"]),
        ("multiworker", HOROVOD, ["strategy=multiworker", "TF_CONFIG"]),
        ("horovod", TF_CONFIG, ["strategy=horovod", "horovodrun"]),
    ],
)
def test_what_does_not_fit_is_refused(name, topology, fragments):
    with pytest.raises(UserError) as error:
        choose_strategy(name, topology, num_gpus=0)
    for fragment in fragments:
        assert fragment in str(error.value)
