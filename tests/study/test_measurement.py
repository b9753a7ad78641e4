"""A worker with several extractors: loaded when needed, references kept for the next worker, variants in settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tribute.behaviors import extractors
from tribute.behaviors.extractors import register_extractor
from tribute.behaviors.features import Features
from tribute.behaviors.reference import fixed_rows
from tribute.config import DataConfig, FeatureConfig, load_preset
from tribute.errors import BehaviorError, ConfigError
from tribute.study.worker import Worker
from tribute.types import Images


class Pixels:
    """Embeddings are pixels; counts the images that it saw."""

    def __init__(self, name: str) -> None:
        self.name, self.fingerprint, self.n_seen = name, name[0] * 64, 0

    def extract(self, images: Images, batch_size: int = 512) -> Features:
        self.n_seen += len(images)
        return Features(images, images.reshape(len(images), -1).astype(np.float32))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Pixels]:
    """Registers extractors `one` and `two`; lists those that were loaded."""
    monkeypatch.setattr(extractors, "_REGISTRY", dict(extractors._REGISTRY))
    found: list[Pixels] = []

    def load(name: str) -> Callable[[FeatureConfig, str], Pixels]:
        def factory(features: FeatureConfig, device: str) -> Pixels:
            found.append(Pixels(name))
            return found[-1]

        return factory

    for name in ("one", "two"):
        register_extractor(name, load(name))
    return found


@pytest.fixture
def make_worker(tiny_preset: Path, tmp_path: Path) -> Callable[..., Worker]:
    def make(*behaviors: str, **features: Any) -> Worker:
        return Worker(
            DataConfig(dataset="digits"),
            load_preset(str(tiny_preset)),
            behaviors=behaviors,
            features=FeatureConfig(**{"extractor": "one", **features}),
            cache_dir=tmp_path / "cache",
            device="cpu",
        )

    return make


def test_a_second_worker_reads_what_the_first_extracted(make_worker, loaded: list[Pixels]) -> None:
    names = ("fid", "entropy@two", "precision")
    first = make_worker(*names)
    images = first.data.reference_images[:40]
    expected = first.measure(images)
    n_real = len(first.data.reference_images)
    assert [(e.name, e.n_seen) for e in loaded] == [("one", n_real + 40), ("two", n_real + 40)]
    again = make_worker(*names)
    assert again.measure(images) == expected
    assert [e.n_seen for e in loaded[2:]] == [40, 40]
    assert again.behavior_definitions() == first.behavior_definitions()


def test_real_images_are_seen_only_if_something_compares_with_them(make_worker, loaded, tmp_path: Path) -> None:
    worker = make_worker("vendi", "vendi@two")
    worker.measure(worker.data.images[:10])
    worker.behavior_definitions()
    assert [e.n_seen for e in loaded] == [10, 10] and not (tmp_path / "cache" / "references").exists()


def test_only_extractors_in_use_are_loaded(make_worker, loaded: list[Pixels], ink_module: str) -> None:
    worker = make_worker(f"{ink_module}:brightness")
    worker.measure(worker.data.images[:3])
    assert loaded == [] and worker.classifier_accuracy is None
    worker = make_worker("vendi@two")
    worker.behavior_definitions()
    assert [e.name for e in loaded] == ["two"] and worker.classifier_accuracy is None


@pytest.fixture
def ink_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "ink_for_measurement.py").write_text(
        "def brightness(images): return float(images.mean())\ndef broken(images): return 1 / 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "ink_for_measurement"


def test_a_fixed_draw_of_real_images_is_told_by_the_variant(make_worker, loaded: list[Pixels]) -> None:
    worker = make_worker("fid", "vendi", max_reference=100)
    worker.measure(worker.data.images[:10])
    assert loaded[0].n_seen == 110
    variants = {name: item["variant"] for name, item in worker.behavior_definitions().items()}
    n_real = len(worker.data.reference_images)
    assert variants["fid"] == f"one oooooooooooo; sample covariance; 100 of {n_real} real images, a fixed draw"
    assert variants["vendi"] == "one oooooooooooo; cosine similarity"
    all_of_them = make_worker("fid", max_reference=n_real)
    assert all_of_them.behavior_definitions()["fid"]["variant"] == "one oooooooooooo; sample covariance"


def test_settings_of_an_evaluation_tell_extractors_apart(make_worker, loaded: list[Pixels]) -> None:
    def settings(worker: Worker) -> dict[str, Any]:
        return worker.settings(worker.preset.sampling, train=None, start="")["behaviors"]

    assert settings(make_worker("fid")) != settings(make_worker("fid", extractor="two"))
    assert settings(make_worker("fid@two"))["fid@two"] == settings(make_worker("fid", extractor="two"))["fid"]
    assert settings(make_worker("fid", batch_size=3)) == settings(make_worker("fid"))


def test_a_frozen_clustering_is_the_same_for_every_worker(make_worker, loaded, monkeypatch) -> None:
    monkeypatch.setitem(extractors._REGISTRY, "blip", lambda features, device: Pixels("blip"))
    first, again = (make_worker("diversity").behavior_definitions()["diversity"] for _ in range(2))
    assert first == again and "; clustering " in first["variant"] and first["unit"] == "bits"


def test_what_is_missing_is_found_before_anything_is_measured(make_worker, loaded: list[Pixels]) -> None:
    with pytest.raises(ConfigError, match=r"features.extractor: expected one of blip, .*; found 'three'"):
        make_worker("fid", extractor="three")
    worker = make_worker("aesthetic_score@one")
    with pytest.raises(BehaviorError, match="--aesthetic_head PATH"):
        worker.behavior_definitions()


@pytest.mark.parametrize(
    ("behaviors", "message"),
    [
        (("fid", "fid_value"), "measured once"),
        (("kid", "fid", "kid"), "measured once"),
        (("inception_score@clip",), r"needs class probabilities; .*'clip' has none"),
    ],
)
def test_behaviors_that_cannot_be_measured_are_refused_at_once(
    make_worker, loaded: list[Pixels], behaviors: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_worker(*behaviors)
    assert loaded == []


def test_sampling_that_is_too_little_or_too_long_is_refused_at_once(make_worker, loaded: list[Pixels]) -> None:
    worker = make_worker("fid")
    sampling = worker.preset.sampling
    worker.check_sampling(sampling)
    with pytest.raises(BehaviorError, match=r"'fid' .*needs at least 2 images; found 1"):
        worker.check_sampling(sampling.replace(n_samples=1))
    with pytest.raises(ConfigError, match="num_inference_steps: expected at most the 1000"):
        worker.check_sampling(sampling.replace(num_inference_steps=1001))
    with pytest.raises(ConfigError, match="guidance_scale"):
        worker.check_sampling(sampling.replace(guidance_scale=2.0))


def test_settings_of_extractors_that_nobody_reads_are_refused(make_worker, loaded: list[Pixels]) -> None:
    with pytest.raises(
        ConfigError, match=r"features.weights: expected extractors inception, one, two, vgg16; found inc"
    ):
        make_worker("fid", weights={"incepton": "w.safetensors"})
    with pytest.raises(ConfigError, match=r"features.models: expected extractors blip, clip, one, two; found vgg16"):
        make_worker("fid", models={"vgg16": "folder"})
    make_worker("fid", models={"one": "folder"}, weights={"vgg16": "w.safetensors"})


def test_real_images_are_measured_from_what_is_known_of_them(
    make_worker, loaded: list[Pixels], ink_module: str
) -> None:
    """A fixed draw, not the first ones; no second pass; what cannot be measured is left out."""
    worker = make_worker("fid", "vendi", f"{ink_module}:brightness", f"{ink_module}:broken")
    n_real = len(worker.data.reference_images)
    values = worker.measurement.measure_real(50)
    assert list(values) == ["fid", f"{ink_module}:brightness"]
    assert loaded[0].n_seen == n_real
    rows = fixed_rows(n_real, 50)
    assert values[f"{ink_module}:brightness"] == worker.data.reference_images[rows].mean()
    expected = make_worker("fid").measure(worker.data.reference_images[rows])["fid"]
    np.testing.assert_allclose(values["fid"], expected, rtol=1e-6)
