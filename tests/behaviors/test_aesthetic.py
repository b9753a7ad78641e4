"""The aesthetic score: unit length, the head as a file, percentiles, and what is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tribute.behaviors.aesthetic import AestheticScore
from tribute.behaviors.base import Reference, extractor_of, get_behavior, uses_reference
from tribute.behaviors.features import Features
from tribute.config import FeatureConfig
from tribute.errors import BehaviorError, ConfigError

MakeFeatures = Callable[..., Features]
WEIGHT, BIAS = np.linspace(-2, 3, 6, dtype=np.float32), 4.5


@pytest.fixture
def head(tmp_path: Path) -> Path:
    path = tmp_path / "head.safetensors"
    save_file({"weight": torch.from_numpy(WEIGHT)[None], "bias": torch.tensor([BIAS])}, path)
    return path


@pytest.fixture
def embeddings() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(41, 6)).astype(np.float32)


@pytest.fixture
def nothing(make_reference: Callable[[np.ndarray], Reference]) -> Reference:
    return make_reference(np.empty((0, 6)))


def behavior(name: str, head: Path) -> Any:
    return get_behavior(name, features=FeatureConfig(aesthetic_head=head))


def test_mean_and_percentiles_of_the_heads_output(make_features: MakeFeatures, nothing, head, embeddings) -> None:
    scores = [float(np.dot(WEIGHT, e) / np.sqrt(np.dot(e, e)) + BIAS) for e in embeddings]
    features = make_features(embeddings)
    assert behavior("aesthetic_score", head).measure(features, nothing) == pytest.approx(np.mean(scores), rel=1e-6)
    for percent, expected in ((0, min(scores)), (50, sorted(scores)[20]), (90, sorted(scores)[36]), (100, max(scores))):
        found = behavior(f"aesthetic_score_p{percent}", head)
        assert found.name == f"aesthetic_score_p{percent}"
        assert found.measure(features, nothing) == pytest.approx(expected, rel=1e-6)


def test_lengths_of_embeddings_do_not_count(make_features: MakeFeatures, nothing, head, embeddings) -> None:
    longer = embeddings * np.linspace(1, 30, len(embeddings))[:, None]
    score = behavior("aesthetic_score", head)
    expected = score.measure(make_features(embeddings), nothing)
    assert score.measure(make_features(longer), nothing) == pytest.approx(expected, rel=1e-6)


def test_it_looks_through_clip_at_no_real_image_and_names_the_head(head: Path) -> None:
    score = behavior("aesthetic_score_p90", head)
    assert extractor_of(score) == "clip" and not uses_reference(score)
    sha256 = hashlib.sha256(head.read_bytes()).hexdigest()
    assert score.variant == f"head {sha256[:12]}; percentile 90"
    elsewhere = behavior("aesthetic_score@blip", head)
    assert elsewhere.name == "aesthetic_score@blip" and elsewhere.variant == f"head {sha256[:12]}; mean"


def test_the_published_file_format_is_read(make_features, nothing, head: Path, tmp_path: Path, embeddings) -> None:
    published = tmp_path / "head.pth"
    torch.save(torch.nn.Linear(6, 1).state_dict() | {"weight": torch.from_numpy(WEIGHT)[None]}, published)
    assert AestheticScore(head=published).measure(make_features(embeddings), nothing) != 0
    torch.save(torch.nn.Linear(6, 1), published)
    with pytest.raises(BehaviorError, match="without running code"):
        AestheticScore(head=published).measure(make_features(embeddings), nothing)


def test_without_a_head_the_message_says_where_it_is() -> None:
    with pytest.raises(BehaviorError, match=r"sa_0_4_vit_l_14_linear\.pth.*--aesthetic_head PATH"):
        _ = get_behavior("aesthetic_score", features=FeatureConfig()).variant


@pytest.mark.parametrize(
    "arrays", [{"weight": torch.ones(2, 6), "bias": torch.ones(2)}, {"weight": torch.ones(6)}, {"w": torch.ones(1, 6)}]
)
def test_files_that_are_no_head(tmp_path: Path, arrays: dict[str, torch.Tensor]) -> None:
    save_file(arrays, tmp_path / "other.safetensors")
    with pytest.raises(BehaviorError, match=r"must hold `weight` of shape \(1, width\)"):
        _ = AestheticScore(head=tmp_path / "other.safetensors").variant


def test_a_head_for_another_network(make_features: MakeFeatures, nothing, head: Path) -> None:
    with pytest.raises(BehaviorError, match="width 6; the extractor's are 4 wide"):
        AestheticScore(head=head).measure(make_features(np.ones((3, 4))), nothing)


def test_percentiles_end_at_100() -> None:
    with pytest.raises(ConfigError, match="percentile from 0 to 100; found 101"):
        get_behavior("aesthetic_score_p101")
