"""The scaling model: its formulas, the fits, and whether docs/scaling.md has the numbers that the code gives."""

import importlib.util
import itertools
from types import ModuleType

import numpy as np
import pytest
from support import CHECKOUT

from mnist_dist.benchmark.cost_model import (
    Collective,
    Device,
    Interconnect,
    Link,
    Mode,
    Workload,
    all_reduce_s,
    amdahl_limit,
    doublings,
    efficiency,
    exact_reduction_s,
    fastest,
    fit_device,
    fit_link,
    hierarchical_all_reduce_s,
    last_paying,
    predict,
    ring_all_reduce_s,
    speed_up,
    tree_all_reduce_s,
)

DOCS = CHECKOUT / "docs"
LINK = Link(alpha_s=5e-6, beta_s_per_byte=1e-10)
FAST_LINK = Link(alpha_s=1e-6, beta_s_per_byte=1e-12)
FREE = Interconnect("free", Link(0, 0))
DEVICE = Device(launch_s=1e-4, overhead_s=2e-4, rows_per_s=1e5)
SIZE = Workload().message_bytes
ALGORITHMS = [ring_all_reduce_s, tree_all_reduce_s, all_reduce_s]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_scaling", DOCS / "make_scaling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Collectives


def test_formulas_by_hand() -> None:
    assert SIZE == 1_077_296
    ring = ring_all_reduce_s(Link(3, 5), num_bytes=8, num_replicas=4)
    assert ring == 2 * 3 * 3 + 2 * 3 / 4 * 8 * 5
    assert tree_all_reduce_s(Link(3, 5), num_bytes=8, num_replicas=5) == 2 * 3 * 3 + 2 * 8 * 5
    # Two nodes of 4: 3 steps each way inside, then the quarters between the two.
    inside = 2 * 3 * (1 + 8 / 4 * 2)
    between = 2 * (3 + 1 * 5)
    found = hierarchical_all_reduce_s(Link(1, 2), between=Link(3, 5), num_bytes=8, num_replicas=8, replicas_per_node=4)
    assert found == inside + between


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_replica_sends_nothing_and_zero_replicas_are_refused(algorithm: Collective) -> None:
    assert algorithm(LINK, num_bytes=SIZE, num_replicas=1) == 0
    assert exact_reduction_s(LINK, num_bytes=SIZE, num_replicas=1, num_shards=8) == 0
    assert Interconnect("nodes", LINK, inside=FAST_LINK).all_reduce_s(SIZE, num_replicas=1) == 0
    with pytest.raises(ValueError, match="0 replicas"):
        algorithm(LINK, num_bytes=SIZE, num_replicas=0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_more_replicas_more_bytes_and_slower_links_cost_more(algorithm: Collective) -> None:
    by_number = [algorithm(LINK, num_bytes=SIZE, num_replicas=n) for n in range(1, 1025)]
    assert by_number == sorted(by_number)
    by_size = [algorithm(LINK, num_bytes=size, num_replicas=8) for size in (0, 1, 10, 1e3, 1e6, 1e9)]
    assert all(few < many for few, many in itertools.pairwise(by_size))
    slower = [Link(2 * LINK.alpha_s, LINK.beta_s_per_byte), Link(LINK.alpha_s, 2 * LINK.beta_s_per_byte)]
    for link in slower:
        assert algorithm(link, num_bytes=SIZE, num_replicas=8) > algorithm(LINK, num_bytes=SIZE, num_replicas=8)


def test_trees_are_for_small_messages_and_rings_for_large_ones() -> None:
    for size, algorithm in ((40, tree_all_reduce_s), (1e9, ring_all_reduce_s)):
        best = all_reduce_s(LINK, num_bytes=size, num_replicas=64)
        assert best == algorithm(LINK, num_bytes=size, num_replicas=64)


def test_one_node_uses_only_its_own_links_and_several_beat_the_interconnect_alone() -> None:
    nodes = Interconnect("nodes", LINK, inside=FAST_LINK, replicas_per_node=8)
    for n in (2, 8):
        assert nodes.all_reduce_s(SIZE, num_replicas=n) == all_reduce_s(FAST_LINK, num_bytes=SIZE, num_replicas=n)
    for n in (16, 64, 1024):
        inside = all_reduce_s(FAST_LINK, num_bytes=SIZE, num_replicas=n)
        assert inside < nodes.all_reduce_s(SIZE, num_replicas=n)
        assert nodes.all_reduce_s(SIZE, num_replicas=n) < all_reduce_s(LINK, num_bytes=SIZE, num_replicas=n)


def test_exact_by_hand() -> None:
    def exact(n: int, num_shards: int = 8, **options: bool) -> float:
        link = Link(SIZE, 1)  # a message's latency is the time of m bytes
        return exact_reduction_s(link, num_bytes=SIZE, num_replicas=n, num_shards=num_shards, **options) / SIZE

    assert exact(2) == pytest.approx(3), "two partial sums are all-reduced, in a ring: 2 (1 + 1/2)"
    assert exact(4) == pytest.approx(3 * (2 + 2 / 4))
    assert exact(8) == pytest.approx(7 * (2 + 2 / 8))
    assert exact(1024, 1024) == pytest.approx(1023 * (2 + 2 / 1024))
    # Shards 0-1 and 2, 3 and 4-5, 6-7: the busiest send two subtrees.
    assert exact(3) == pytest.approx(2 * (2 + 3 / 3))
    # The tree over 6 shards is cut at 4, not at 3: two subtrees from each of two replicas, too little for two calls.
    assert exact(2, 6) == pytest.approx(1 * (1 + 2))
    assert exact(8, has_all_to_all=False) == pytest.approx(7 * (1 + 1))
    assert exact(3, has_all_to_all=False) == pytest.approx(2 * (1 + 2))
    with pytest.raises(ValueError, match="8 shards cannot be divided over 9 replicas"):
        exact(9)


@pytest.mark.parametrize("link", [LINK, FAST_LINK, Link(0, 1)])
def test_exact_costs_no_more_than_a_ring_on_powers_of_two(link: Link) -> None:
    for n in doublings()[1:]:
        exact = exact_reduction_s(link, num_bytes=SIZE, num_replicas=n, num_shards=1024)
        assert exact <= 1.0001 * ring_all_reduce_s(link, num_bytes=SIZE, num_replicas=n)


# Steps and epochs


def test_step_is_the_sum_of_its_parts() -> None:
    interconnect = Interconnect("ring", LINK)
    step = predict(DEVICE, interconnect=interconnect, mode="strong", num_replicas=4)
    assert step.step_s == pytest.approx(1e-4 + 2e-4 + 128 / 1e5 + all_reduce_s(LINK, num_bytes=SIZE, num_replicas=4))
    assert step.steps_per_epoch == 97
    assert step.epoch_s == 97 * step.step_s
    weak = predict(DEVICE, interconnect=interconnect, mode="weak", num_replicas=4)
    assert weak.compute_s == pytest.approx(2e-4 + 512 / 1e5)
    assert weak.steps_per_epoch == 25
    assert predict(DEVICE, interconnect=interconnect, mode="weak", num_replicas=1024).steps_per_epoch == 1


@pytest.mark.parametrize("mode", ["strong", "weak"])
def test_a_free_interconnect_is_never_worse_and_efficiency_never_above_one(mode: Mode) -> None:
    alone = predict(DEVICE, interconnect=FREE, mode=mode, num_replicas=1)
    for n in (1, 2, 3, 8, 64, 1024):
        free = predict(DEVICE, interconnect=FREE, mode=mode, num_replicas=n)
        real = predict(DEVICE, interconnect=Interconnect("", LINK), mode=mode, num_replicas=n)
        assert real.epoch_s >= free.epoch_s
        assert 0 < efficiency(alone, real, mode=mode) <= efficiency(alone, free, mode=mode) <= 1 + 1e-12
        assert speed_up(alone, free) <= n + 1e-12


def test_amdahl_bounds_strong_scaling() -> None:
    alone = predict(DEVICE, interconnect=FREE, mode="strong", num_replicas=1)
    many = predict(DEVICE, interconnect=FREE, mode="strong", num_replicas=512, workload=Workload())
    limit = amdahl_limit(DEVICE)
    assert limit == pytest.approx((3e-4 + 512 / 1e5) / 3e-4)
    assert 0.9 * limit < speed_up(alone, many) < limit
    assert amdahl_limit(Device(0, 0, 1)) == float("inf")


def test_where_it_stops_paying_by_brute_force() -> None:
    generator = np.random.default_rng(0)
    numbers = [2**power for power in range(11)]
    for _ in range(200):
        seconds = dict(zip(numbers, np.cumprod(generator.uniform(0.5, 1.05, size=11)), strict=True))
        gains = [1 - seconds[2 * n] / seconds[n] for n in numbers[:-1]]
        paying = [gain >= 0.1 for gain in gains]
        expected = numbers[paying.index(False)] if False in paying else 1024
        assert last_paying(seconds.__getitem__) == expected
        assert seconds[fastest(seconds.__getitem__)] == min(seconds.values())
    assert last_paying(lambda n: 1 / n, limit=64) == 64
    assert fastest(lambda n: 1 / n, limit=100) == 64
    assert fastest(lambda n: 1.0) == last_paying(lambda n: 1.0) == 1


# Fits


def rows_of(link: Link, algorithm: Collective, *, noise: float) -> list[dict[str, float]]:
    generator = np.random.default_rng(1)
    return [
        {
            "bytes": size,
            "seconds": algorithm(link, num_bytes=size, num_replicas=n) * generator.uniform(1 - noise, 1 + noise),
            "num_replicas": n,
        }
        for size in (40, 4_000, 100_000, SIZE, 10_000_000)
        for n in (2, 4, 8)
    ]


@pytest.mark.parametrize("algorithm", [ring_all_reduce_s, tree_all_reduce_s])
@pytest.mark.parametrize("link", [LINK, FAST_LINK, Link(2e-3, 1e-9)])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_fit_finds_the_link(algorithm: Collective, link: Link, noise: float) -> None:
    found = fit_link(rows_of(link, algorithm, noise=noise), algorithm=algorithm)
    assert found.alpha_s == pytest.approx(link.alpha_s, rel=noise + 1e-9)
    assert found.beta_s_per_byte == pytest.approx(link.beta_s_per_byte, rel=noise + 1e-9)


def test_fit_leaves_out_single_replicas_and_never_goes_below_zero() -> None:
    rows = rows_of(LINK, ring_all_reduce_s, noise=0)
    assert fit_link([*rows, {"bytes": 8, "seconds": 1.0, "num_replicas": 1}]) == fit_link(rows)
    # Larger messages were faster, as noise may cause: no negative time per byte.
    falling = [{"bytes": size, "seconds": 1e-3 - size * 1e-9, "num_replicas": 2} for size in (10, 1e3, 1e5)]
    assert fit_link(falling).beta_s_per_byte == 0
    assert fit_link(falling).alpha_s == pytest.approx(0.5e-3, rel=0.1)
    # Faster than proportional to its size: no negative latency.
    rising = [{"bytes": size, "seconds": size**1.5 * 1e-9, "num_replicas": 2} for size in (1e3, 1e4)]
    assert fit_link(rising).alpha_s == 0


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"bytes": 8, "seconds": 1.0, "num_replicas": 2}],
        [{"bytes": 8, "seconds": 1.0, "num_replicas": 2}] * 5,
        [{"bytes": size, "seconds": 1.0, "num_replicas": 1} for size in (8, 80)],
        [{"bytes": 0, "seconds": 1.0, "num_replicas": n} for n in (2, 4)],
    ],
)
def test_fit_with_too_few_rows(rows: list[dict[str, float]]) -> None:
    with pytest.raises(ValueError, match="measure at least two sizes"):
        fit_link(rows)


@pytest.mark.parametrize("wrong", [{"seconds": 0.0}, {"seconds": float("nan")}, {"bytes": -1}, {"num_replicas": 0}])
def test_fit_refuses_what_cannot_be(wrong: dict[str, float]) -> None:
    rows = [*rows_of(LINK, ring_all_reduce_s, noise=0), {"bytes": 8, "seconds": 1.0, "num_replicas": 2} | wrong]
    with pytest.raises(ValueError, match="must be positive numbers"):
        fit_link(rows)


def test_link_is_not_negative() -> None:
    with pytest.raises(ValueError, match="not negative"):
        Link(-1e-6, 0)


def test_fit_of_a_device() -> None:
    rows = [{"rows": n, "seconds": DEVICE.launch_s + DEVICE.compute_s(n)} for n in (64, 128, 512)]
    found = fit_device(rows, launch_s=1e-4)
    assert (found.launch_s, found.overhead_s, found.rows_per_s) == pytest.approx((1e-4, 2e-4, 1e5))
    with pytest.raises(ValueError, match="fewer than two"):
        fit_device(rows[:1])
    with pytest.raises(ValueError, match="do not take longer"):
        fit_device([{"rows": 1, "seconds": 2.0}, {"rows": 2, "seconds": 1.0}])


# The page


def test_page_has_the_numbers_of_the_code() -> None:
    script = load_script()
    page = (DOCS / "scaling.md").read_text()
    assert script.render(page) == page, "run: python docs/make_scaling.py"
    assert (DOCS / "images" / "scaling.png").stat().st_size < 300_000


def test_what_the_page_concludes() -> None:
    """It says so in words; if an assumption changes, the words must change as well."""
    script = load_script()
    for interconnect in script.INTERCONNECTS:
        strong = script.epochs(script.ASSUMED_GPU, interconnect, "strong")
        assert last_paying(strong) == 1, "on GPUs strong scaling does not pay"
        assert fastest(strong) <= 2
        assert strong(1) / strong(fastest(strong)) < 1.01
        assert fastest(script.epochs(script.ASSUMED_GPU, interconnect, "weak")) == 128, (
            "as long as there are steps to save"
        )
    for interconnect in script.FLAT:
        assert fastest(script.epochs(script.ASSUMED_GPU, interconnect, "strong")) == 1
        assert last_paying(script.epochs(script.measured_core(), interconnect, "strong")) >= 16
