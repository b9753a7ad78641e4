"""Feature flags: which extractor a value belongs to, what contradicts, and that a dry run shows the result."""

from __future__ import annotations

from pathlib import Path

import pytest

from tribute.cli.arguments import FeatureArguments, parse
from tribute.config import FeatureConfig
from tribute.errors import ConfigError


def features(*argv: str, behaviors: tuple[str, ...] = ("fid",)) -> FeatureConfig:
    return parse(FeatureArguments, argv, prog="test", description="").features(behaviors)


def test_without_flags_it_is_the_default() -> None:
    assert features() == FeatureConfig()


def test_values_go_to_the_extractors_they_name() -> None:
    found = features(
        *("--feature_weights", "inception=a/b=c.pth", "vgg16=v.safetensors"),
        *("--feature_models", "clip=models/clip", "blip=Someone/blip", "--feature_revisions", f"blip={'a' * 40}"),
        *("--feature_extractor", "inception", "--feature_batch_size", "8", "--max_reference", "500"),
        *("--aesthetic_head", "head.pth"),
    )
    assert found == FeatureConfig(
        extractor="inception",
        weights={"inception": Path("a/b=c.pth"), "vgg16": Path("v.safetensors")},
        models={"clip": "models/clip", "blip": "Someone/blip"},
        revisions={"blip": "a" * 40},
        batch_size=8,
        max_reference=500,
        aesthetic_head=Path("head.pth"),
    )


def test_a_path_alone_is_that_of_the_network_in_use() -> None:
    found = features("--feature_weights", "w.pth", behaviors=("fid@inception", "kid@clip", "fid"))
    assert found.weights == {"inception": Path("w.pth")}
    found = features("--feature_weights", "w.pth", "--feature_extractor", "vgg16", behaviors=("precision",))
    assert found.weights == {"vgg16": Path("w.pth")}


@pytest.mark.parametrize("behaviors", [("fid",), ("fid@inception", "precision@vgg16")])
def test_a_path_alone_must_be_clear(behaviors: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"--feature_weights: expected NAME=VALUE.*found 'w\.pth'"):
        features("--feature_weights", "w.pth", behaviors=behaviors)


@pytest.mark.parametrize("entries", [("clip=a", "clip=b"), ("clip=",), ("=a",), ("clip",)])
def test_unclear_entries_are_refused(entries: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="--feature_models: expected NAME=VALUE"):
        features("--feature_models", *entries)
