"""How a global batch is cut, and whether for exact or for fast."""

import pytest

from mnist_dist.config import compose_config
from mnist_dist.data.shards import ShardPlan
from mnist_dist.errors import UserError
from mnist_dist.training import plan_shards


@pytest.mark.parametrize(
    ("asked", "num_replicas", "on_gpu", "mode"),
    [
        ("auto", 1, False, "exact"),
        ("auto", 8, False, "exact"),
        ("auto", 9, False, "fast"),
        ("auto", 1, True, "fast"),
        ("exact", 2, True, "exact"),
        ("fast", 2, False, "fast"),
    ],
)
def test_mode(asked, num_replicas, on_gpu, mode):
    config = compose_config(f"reproducibility={asked}")
    assert plan_shards(config, 512, num_replicas=num_replicas, on_gpu=on_gpu)[0] == mode


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 8])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_exact_cuts_alike_for_any_number_of_replicas(num_replicas, on_gpu):
    config = compose_config("reproducibility=exact")
    _, plan = plan_shards(config, 500, num_replicas=num_replicas, on_gpu=on_gpu)
    assert plan == ShardPlan(8, 63, num_replicas)  # 504 rows; four are padding


@pytest.mark.parametrize("global_batch_size", [1, 7, 100, 511, 512, 4096])
@pytest.mark.parametrize("num_replicas", [1, 2, 3, 8])
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_the_shards_hold_the_batch_and_little_more(global_batch_size, num_replicas, mode):
    config = compose_config(f"reproducibility={mode}")
    _, plan = plan_shards(config, global_batch_size, num_replicas=num_replicas, on_gpu=False)
    assert global_batch_size <= plan.num_rows < global_batch_size + plan.num_shards
    if mode == "fast":
        counts = {len(plan.shards_of(replica)) for replica in range(num_replicas)}
        assert len(counts) == 1


def test_exact_with_more_replicas_than_shards_is_refused():
    with pytest.raises(UserError, match=r"^batch\.num_shards=8: fewer shards than the 9 replicas.*batch\.num_shards=9"):
        plan_shards(compose_config("reproducibility=exact"), 512, num_replicas=9, on_gpu=False)
