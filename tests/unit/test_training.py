"""How a global batch is split, and whether for exact or fast."""

import pytest

from mnist_dist.base.errors import UserError
from mnist_dist.config.compose import compose_config
from mnist_dist.engine.mode import choose_compiler, choose_mode
from mnist_dist.engine.shards import ShardPlan, plan_shards
from mnist_dist.launch.topology import HorovodRun, Topology

ONE_PROCESS, NINE_PROCESSES = Topology(), Topology(HorovodRun("h:1"), 0, 9, 0, 9)
NINE_REPLICAS = ("strategy=mirrored", "strategy.num_replicas=9")


@pytest.mark.parametrize(
    ("asked", "topology", "num_gpus", "mode"),
    [
        (["auto"], ONE_PROCESS, 0, "exact"),
        (["auto", "strategy=mirrored", "strategy.num_replicas=8"], ONE_PROCESS, 0, "exact"),
        (["auto", *NINE_REPLICAS], ONE_PROCESS, 0, "fast"),
        (["auto"], NINE_PROCESSES, 0, "fast"),
        (["auto", "batch.num_shards=9"], NINE_PROCESSES, 0, "exact"),
        (["auto"], ONE_PROCESS, 1, "fast"),
        (["exact"], ONE_PROCESS, 2, "exact"),
        (["fast", "strategy=mirrored", "strategy.num_replicas=2"], ONE_PROCESS, 0, "fast"),
    ],
)
def test_mode(asked, topology, num_gpus, mode):
    config = compose_config(f"reproducibility={asked[0]}", *asked[1:])
    assert choose_mode(config, topology, num_gpus=num_gpus) == mode


@pytest.mark.parametrize(
    ("asked", "mode", "on_gpu", "is_single", "compiler"),
    [
        ("auto", "fast", True, True, "xla"),
        ("auto", "exact", True, True, "none"),
        ("auto", "fast", False, True, "none"),
        ("auto", "fast", True, False, "none"),
        ("none", "fast", True, True, "none"),
        ("xla", "exact", False, False, "xla"),
        ("auto model=keras model.factory=a:b", "fast", True, True, "none"),
        ("xla model=keras model.factory=a:b", "fast", True, True, "xla"),
    ],
)
def test_compiler(asked, mode, on_gpu, is_single, compiler):
    config = compose_config(*f"compile={asked}".split())
    assert choose_compiler(config, mode=mode, on_gpu=on_gpu, is_single=is_single) == compiler


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        (["threads.intra_op=8"], "WARNING: threads.intra_op=8 is ignored: reproducibility=exact runs each operation"),
        (["threads.intra_op=8", "reproducibility=exact"], "WARNING: threads.intra_op=8 is ignored"),
        (["threads.intra_op=1"], None),
        (["threads.intra_op=8", "reproducibility=fast"], None),
        (
            NINE_REPLICAS,
            "WARNING: batch.num_shards=8: fewer shards than the 9 replicas, so reproducibility=auto is fast",
        ),
        ([*NINE_REPLICAS, "threads.intra_op=8"], "WARNING: batch.num_shards=8: fewer shards"),
        ([*NINE_REPLICAS, "reproducibility=fast"], None),
        ([*NINE_REPLICAS, "batch.num_shards=9"], None),
        ([], None),
    ],
)
def test_settings_without_effect_are_reported(overrides, warned, logged):
    choose_mode(compose_config(*overrides), ONE_PROCESS, num_gpus=0)
    assert len(logged()) == (warned is not None)
    assert all(line.startswith(warned) for line in logged())


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 8])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_exact_splits_the_same_for_any_number_of_replicas(num_replicas, on_gpu):
    config = compose_config("reproducibility=exact")
    plan = plan_shards(config, 500, num_replicas=num_replicas, on_gpu=on_gpu)
    assert plan == ShardPlan(8, 63, num_replicas)  # 504 rows; four are padding


@pytest.mark.parametrize("global_batch_size", [1, 7, 100, 511, 512, 4096])
@pytest.mark.parametrize("num_replicas", [1, 2, 3, 8])
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_the_shards_hold_the_batch_and_little_else(global_batch_size, num_replicas, mode):
    config = compose_config(f"reproducibility={mode}")
    plan = plan_shards(config, global_batch_size, num_replicas=num_replicas, on_gpu=False)
    assert global_batch_size <= plan.num_rows < global_batch_size + plan.num_shards
    if mode == "fast":
        counts = {len(plan.shards_of(replica)) for replica in range(num_replicas)}
        assert len(counts) == 1


def test_exact_with_more_replicas_than_shards_is_refused():
    with pytest.raises(UserError, match=r"^batch\.num_shards=8: fewer shards than the 9 replicas.*batch\.num_shards=9"):
        plan_shards(compose_config("reproducibility=exact"), 512, num_replicas=9, on_gpu=False)
