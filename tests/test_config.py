from pathlib import Path

import numpy as np
import pytest

from mnist_dist.base.errors import UserError
from mnist_dist.config.compose import compose_config
from mnist_dist.config.rules import FLOAT32_MAX, FLOAT32_TINY


@pytest.mark.parametrize("name", ["original", "seed"])
def test_the_defaults_are_the_original_recipe(name):
    assert compose_config("data=mnist") == compose_config("data=mnist", f"experiment={name}")
    config = compose_config()
    assert (config.trainer.epochs, config.batch.global_size, config.model.hidden_sizes) == (150, 512, [256, 256])
    assert (config.optimizer.name, config.optimizer.learning_rate, config.model.dropout) == ("adam", 0.001, 0.4)


def test_the_command_line_is_stronger_than_an_experiment():
    assert compose_config("experiment=debug").trainer.epochs == 3
    assert compose_config("experiment=debug", "trainer.epochs=7").trainer.epochs == 7


def test_out_of_range_names_key_value_and_rule():
    with pytest.raises(UserError, match=r"^model\.dropout=1\.0: must be from 0 to 0\.9999$"):
        compose_config("model.dropout=1.0")


def test_ranges_are_those_of_float32():
    assert np.finfo(np.float32).max == FLOAT32_MAX
    assert np.finfo(np.float32).tiny == FLOAT32_TINY
    below_1 = 1 - 2**-25  # half-way from the last float32 to 1, and rounded to 1
    assert np.float32(below_1) == 1
    assert np.float32(np.nextafter(below_1, 0)) < 1
    for key in ("beta_1", "beta_2"):
        compose_config(f"optimizer.{key}={np.nextafter(below_1, 0)!s}")
        with pytest.raises(UserError, match="less than 1 in float32"):
            compose_config(f"optimizer.{key}={below_1}")


def test_every_key_is_in_the_readme():
    """A table of keys that misses one is worse than none."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for model in ("mlp", "cnn"):
        for optimizer in ("adam", "sgd"):
            config = compose_config(f"model={model}", f"optimizer={optimizer}")
            for key, value in vars(config).items():
                nested = [f"{key}.{name}" for name in vars(value)] if hasattr(value, "__dict__") else [key]
                for name in nested:
                    assert name.endswith(".name") or f"`{name}`" in readme, name
