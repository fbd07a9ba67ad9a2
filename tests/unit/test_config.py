from dataclasses import asdict, replace

import numpy as np
import pytest
from omegaconf import OmegaConf
from support import CHECKOUT

from mnist_dist.base.errors import UserError
from mnist_dist.config.compare import IMPLIED, training_keys
from mnist_dist.config.compose import TRAIN, choices_with, compose, compose_config, to_config
from mnist_dist.config.describe import describe_keys
from mnist_dist.config.rules import FLOAT32_MAX, FLOAT32_TINY


@pytest.mark.parametrize("name", ["original", "seed"])
def test_the_defaults_are_the_original_recipe(name):
    assert compose_config("data=mnist") == compose_config("data=mnist", f"experiment={name}")
    config = compose_config()
    assert (config.trainer.epochs, config.batch.global_size, config.model.hidden_sizes) == (150, 512, [256, 256])
    assert (config.optimizer.name, config.optimizer.learning_rate, config.model.dropout) == ("adam", 0.001, 0.4)


def test_the_command_line_overrides_an_experiment():
    assert compose_config("experiment=debug").trainer.epochs == 3
    assert compose_config("experiment=debug", "trainer.epochs=7").trainer.epochs == 7


def test_out_of_range_names_key_value_and_rule():
    with pytest.raises(UserError, match=r"^model\.dropout=1\.0: must be from 0 to 0\.9999$"):
        compose_config("model.dropout=1.0")


def test_ranges_are_those_of_float32():
    assert np.finfo(np.float32).max == FLOAT32_MAX
    assert np.finfo(np.float32).tiny == FLOAT32_TINY
    below_1 = 1 - 2**-25  # halfway from the last float32 to 1, so rounded to 1
    assert np.float32(below_1) == 1
    assert np.float32(np.nextafter(below_1, 0)) < 1
    for key in ("beta_1", "beta_2"):
        compose_config(f"optimizer.{key}={np.nextafter(below_1, 0)!s}")
        with pytest.raises(UserError, match="less than 1 in float32"):
            compose_config(f"optimizer.{key}={below_1}")


def test_the_tables_of_keys_match_the_schemas(monkeypatch):
    """`python docs/make_configuration.py` writes it."""
    monkeypatch.syspath_prepend(CHECKOUT / "docs")
    import make_configuration

    for name in make_configuration.PLACES:
        monkeypatch.delenv(name, raising=False)
    page = make_configuration.PAGE.read_text()
    assert [command for command, _ in make_configuration.TABLE.findall(page)] == ["train", "doctor", "verify", "sweep"]
    assert page == make_configuration.build_page()


def test_every_key_has_a_description():
    for key in describe_keys(compose(TRAIN, [])):
        assert key.meaning.endswith("."), key.name


def test_a_run_of_an_earlier_version_had_the_defaults_of_newer_keys():
    """Its configuration has no such keys; one that could not be read says nothing."""
    asked = asdict(compose_config())
    assert training_keys(asked).items() >= (IMPLIED | {"compile": "auto"}).items()
    assert training_keys({"seed": 0, "trainer": {"epochs": 3}}) == {**IMPLIED, "seed": "0"}
    assert training_keys({"compile": "xla"}) == {**IMPLIED, "compile": "xla"}
    assert training_keys({}) == {}


@pytest.mark.parametrize(
    ("overrides", "lasts"),
    [
        ([], "None"),
        (["learning_rate.schedule_epochs=7"], "None"),
        (["learning_rate.schedule=step", "learning_rate.schedule_epochs=7"], "None"),
        (["learning_rate.schedule=cosine"], "5"),
        (["learning_rate.schedule=one_cycle"], "5"),
        (["learning_rate.schedule=cosine", "learning_rate.schedule_epochs=3"], "3"),
    ],
)
def test_how_long_a_schedule_lasts_is_known_where_it_matters(overrides, lasts):
    config = compose_config("trainer.epochs=5", *overrides)
    longer = replace(config, trainer=replace(config.trainer, epochs=8))
    for one in (config, longer):
        assert training_keys(asdict(one))["learning_rate.schedule_epochs"] == lasts


def test_the_fast_recipe():
    config = compose_config("experiment=fast")
    assert (config.model.name, config.model.hidden_sizes, config.model.dropout) == ("mlp", [256, 256], 0.0)
    assert (config.augment.name, config.augment.max_pixels, config.loss.label_smoothing) == ("shift", 1, 0.02)
    assert (config.learning_rate.schedule, config.learning_rate.schedule_epochs) == ("one_cycle", 7)
    assert (config.batch.global_size, config.trainer.epochs, config.optimizer.learning_rate) == (256, 10, 0.006)


def test_a_file_of_an_earlier_version_has_what_that_version_did(tmp_path):
    """Without the keys that are newer, among them a whole section and some that may not be missing."""
    tree = OmegaConf.to_container(OmegaConf.create(asdict(compose_config("trainer.epochs=3"))))
    for section, key in (key.split(".") for key in IMPLIED if "." in key):
        tree[section].pop(key)
    for key in ("augment", "loss", "gradient_clip_norm", "compile", "report", "tensorboard"):
        tree.pop(key)
    defaults = ["schema/train@_global_", *({name: tree[name]["name"]} for name in ("data", "model", "optimizer"))]
    defaults += [*({name: tree[name]["name"]} for name in ("strategy", "precision")), "_self_"]
    (tmp_path / "old.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create({"defaults": defaults, **tree})))
    found = to_config(TRAIN, compose(TRAIN, [], config_dir=str(tmp_path), config_name="old"))
    assert asdict(found) == asdict(compose_config("trainer.epochs=3", "compile=none"))


@pytest.mark.parametrize(
    ("key", "choices"),
    [
        ("augment.max_pixels", ["augment=shift", "augment=affine"]),
        ("optimizer.weight_decay", ["optimizer=adamw"]),
        ("model.factory", ["model=keras"]),
        ("model.nothing", []),
    ],
)
def test_choices_with_a_key(key, choices):
    assert choices_with(key) == choices
