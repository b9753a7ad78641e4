from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tribute.config import (
    Config,
    NoiseScheduleConfig,
    OptimizerConfig,
    Preset,
    PruneConfig,
    SampleConfig,
    StudyConfig,
    TrainConfig,
    UNetConfig,
    fingerprint,
    load_preset,
    preset_names,
)
from tribute.errors import ConfigError

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


def leaves(value: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Every number, text and truth value of nested settings, with where it stands."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    elif value is not None:
        yield path, value


def changed(settings: Any, path: tuple) -> Any:
    """The settings with one leaf changed."""
    copy = json.loads(json.dumps(settings))
    place = copy
    for key in path[:-1]:
        place = place[key]
    old = place[path[-1]]
    place[path[-1]] = (not old) if isinstance(old, bool) else old + "x" if isinstance(old, str) else old * 0.5 or 0.25
    if isinstance(old, int) and not isinstance(old, bool):
        place[path[-1]] = old + 1
    return copy


@pytest.mark.parametrize("name", preset_names())
def test_presets_survive_the_way_through_yaml(name: str, tmp_path: Path) -> None:
    preset = load_preset(name)
    (tmp_path / "preset.yaml").write_text(preset.to_yaml())
    again = load_preset(str(tmp_path / "preset.yaml"))
    assert again == preset
    assert again.fingerprint() == preset.fingerprint()
    assert set(preset.training) == {"retrain", "prune_fine_tune", "gd"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_studies(path: Path, tmp_path: Path) -> None:
    study = StudyConfig.from_yaml(path)
    assert study.name == path.stem
    preset = study.load_preset()
    assert study.preset is not None or preset.dataset == study.dataset
    (tmp_path / "study.yaml").write_text(study.to_yaml())
    assert StudyConfig.from_yaml(tmp_path / "study.yaml") == study


def test_there_are_examples() -> None:
    assert EXAMPLES


def test_the_cifar_preset_is_the_published_one() -> None:
    preset = load_preset("cifar")
    retrain = preset.training["retrain"]
    assert preset.unet.block_out_channels == (128, 256, 256, 256)
    assert preset.unet.down_block_types.index("AttnDownBlock2D") == 1  # 32 -> 16 pixels
    assert (retrain.optimizer.name, retrain.optimizer.lr, retrain.batch_size) == ("Adam", 1e-4, 128)
    assert (retrain.ema_max_decay, retrain.max_grad_norm, retrain.antithetic_timesteps) == (0.9999, 1.0, True)
    assert (preset.sampling.sampler, preset.sampling.num_inference_steps, preset.sampling.n_samples) == (
        "ddim",
        100,
        10_240,
    )
    small = load_preset("cifar-small").unet
    assert small == preset.unet.replace(block_out_channels=(32, 64, 64, 64))


@pytest.mark.parametrize("name", preset_names())
def test_every_setting_counts_in_the_fingerprint(name: str) -> None:
    preset = load_preset(name)
    settings = preset.model_dump(mode="json")
    n_changed = 0
    for path, _ in leaves(settings):
        try:
            other = Preset.model_validate(changed(settings, path))
        except ValueError:
            continue  # the changed value is not allowed
        n_changed += 1
        assert other.fingerprint() != preset.fingerprint(), path
    assert n_changed > 60


def test_fingerprints_are_pinned_and_ignore_the_order_of_keys() -> None:
    assert fingerprint({"b": [1, 2.5, None], "a": "é"}) == fingerprint({"a": "é", "b": [1, 2.5, None]})
    assert (
        fingerprint({"b": [1, 2.5, None], "a": "é"})
        == "84afbf1d4853005f9dd0c81cb1819b53ce86978340764c062160f6e8356665de"
    )
    assert TrainConfig(n_steps=3, opt_seed=1).fingerprint() == TrainConfig(opt_seed=1, n_steps=3).fingerprint()
    # The same setting written as an integer and as a float is the same setting.
    assert TrainConfig(max_grad_norm=1).fingerprint() == TrainConfig(max_grad_norm=1.0).fingerprint()


def test_unknown_settings_are_named_with_their_place(tmp_path: Path) -> None:
    settings = load_preset("digits").model_dump(mode="json")
    settings["training"]["gd"]["n_stepz"] = 3
    settings["unett"] = {}
    (tmp_path / "p.yaml").write_text(json.dumps(settings))
    with pytest.raises(ConfigError) as error:
        Preset.from_yaml(tmp_path / "p.yaml")
    message = str(error.value)
    assert "training.gd.n_stepz: unknown setting" in message
    assert "unett: unknown setting" in message
    assert "p.yaml" in message


@pytest.mark.parametrize(
    ("model", "key", "value"),
    [
        (PruneConfig, "pruning_ratio", 1.0),
        (PruneConfig, "pruning_ratio", -0.1),
        (PruneConfig, "pruner", "l1"),
        (PruneConfig, "thr", 1.5),
        (TrainConfig, "n_steps", -1),
        (TrainConfig, "batch_size", 0),
        (TrainConfig, "batch_size", 1.5),
        (TrainConfig, "gradient_accumulation_steps", 0),
        (TrainConfig, "ema_max_decay", 1.0),
        (TrainConfig, "mixed_precision", "fp8"),
        (TrainConfig, "opt_seed", -1),
        (OptimizerConfig, "lr", 0.0),
        (OptimizerConfig, "lr", math.inf),
        (OptimizerConfig, "lr", math.nan),
        (OptimizerConfig, "betas", (0.9, 1.0)),
        (OptimizerConfig, "name", "SGD"),
        (SampleConfig, "n_samples", 0),
        (SampleConfig, "sampler", "euler"),
        (NoiseScheduleConfig, "num_train_timesteps", 1),
        (UNetConfig, "norm_num_groups", 0),
        (StudyConfig, "name", "../elsewhere"),
        (StudyConfig, "behaviors", ()),
    ],
)
def test_values_out_of_range_are_named_with_what_was_found(model: type[Config], key: str, value: Any) -> None:
    required = {"name": "study"} if model is StudyConfig else {}
    model.parse(required, where="test")
    with pytest.raises(ConfigError) as error:
        model.parse({**required, key: value}, where="test settings")
    assert "test settings" in str(error.value)
    assert key in str(error.value)
    if key != "betas":
        assert repr(value) in str(error.value) or not value


def test_settings_that_are_not_a_mapping(tmp_path: Path) -> None:
    for text, expected in [("- 1", "list"), ("", "NoneType"), ("a: [", "YAML")]:
        (tmp_path / "s.yaml").write_text(text)
        with pytest.raises(ConfigError, match=expected):
            StudyConfig.from_yaml(tmp_path / "s.yaml")
    (tmp_path / "s.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"s\.yaml"):
        StudyConfig.from_yaml(tmp_path / "s.yaml")
    with pytest.raises(ConfigError, match="no settings at"):
        StudyConfig.from_yaml(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError):
        StudyConfig.from_yaml(tmp_path)


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("name: !!python/object/apply:os.getcwd []")
    with pytest.raises(ConfigError, match="YAML"):
        StudyConfig.from_yaml(tmp_path / "s.yaml")


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'imagenet'.*cifar, cifar-16, cifar-small, .*digits"):
        load_preset("imagenet")


def test_train_config_applies_what_is_given_and_nothing_else() -> None:
    preset = load_preset("digits")
    base = preset.training["gd"]
    assert preset.train_config("gd") == base
    assert preset.train_config("gd", lr=None, n_steps=None) == base
    other = preset.train_config("gd", lr=0.5, n_steps=0, opt_seed=7)
    assert other.optimizer == base.optimizer.replace(lr=0.5)
    assert other == base.replace(n_steps=0, opt_seed=7, optimizer=other.optimizer.model_dump())
    assert preset.training["gd"] == base
    with pytest.raises(ConfigError, match=r"retrain, prune_fine_tune, gd; found 'lora'"):
        preset.train_config("lora")
    with pytest.raises(ConfigError, match="batch_size"):
        preset.train_config("gd", batch_size=-1)
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        preset.train_config("gd", lr=-1.0)


def test_a_study_changes_only_the_sampling_it_names() -> None:
    study = StudyConfig(name="s", sampling={"n_samples": 7})
    assert study.load_preset() == load_preset("digits").replace(
        sampling={**load_preset("digits").sampling.model_dump(), "n_samples": 7}
    )
    with pytest.raises(ConfigError, match="n_images"):
        StudyConfig(name="s", sampling={"n_images": 7}).load_preset()


def test_settings_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig().n_steps = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("db", "shown"),
    [
        ("postgresql+psycopg://ana:s3cr:et@host:5432/db", "postgresql+psycopg://ana:***@host:5432/db"),
        ("postgresql+psycopg://ana@host:5432/db", "postgresql+psycopg://ana@host:5432/db"),
        ("postgresql+psycopg://host:5432/db", "postgresql+psycopg://host:5432/db"),
        ("runs/all.db", "runs/all.db"),
        (None, None),
    ],
)
def test_settings_that_are_shown_have_no_password(db: str | None, shown: str | None) -> None:
    config = StudyConfig.parse({"name": "a", "db": db}, where="test")
    assert config.without_password() == {**config.model_dump(mode="json"), "db": shown}
