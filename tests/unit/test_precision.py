import pytest

from mnist_dist.engine.precision import choose_precision


@pytest.mark.parametrize(
    ("capability", "policy"),
    [(None, "float32"), ((6, 1), "float32"), ((7, 0), "mixed_float16"), ((7, 5), "mixed_float16"),
     ((8, 0), "mixed_bfloat16"), ((9, 0), "mixed_bfloat16")],
)  # fmt: skip
def test_automatic_precision(capability, policy):
    assert choose_precision("auto", capability) == policy
    assert choose_precision("float32", capability) == "float32"
