"""One measurement through several extractors: names, passes, references, and what is not needed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tribute.behaviors import extractors
from tribute.behaviors.base import (
    Reference,
    behavior_variant,
    extractor_of,
    get_behavior,
    measure_behaviors,
    uses_reference,
)
from tribute.behaviors.extractors import extractor_names, load_extractor, register_extractor
from tribute.behaviors.features import Features
from tribute.config import FeatureConfig
from tribute.errors import ConfigError, MixedResultsError
from tribute.types import Images


class Pixels:
    """Embeddings are pixels times a factor."""

    name = "pixels"
    preparation = "as they are"

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.fingerprint, self.n_passes = factor, f"{factor:.0f}" * 64, 0

    def extract(self, images: Images, batch_size: int = 512) -> Features:
        self.n_passes += 1
        return Features(images, self.factor * images.reshape(len(images), -1).astype(np.float32))


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(extractors, "_REGISTRY", dict(extractors._REGISTRY))
    register_extractor("pixels", lambda features, device: Pixels(features.batch_size or 1))
    return


@pytest.fixture
def images(digits: tuple[Images, np.ndarray]) -> Images:
    return digits[0][:60]


def test_a_behavior_names_its_extractor() -> None:
    behavior = get_behavior("fid_value@pixels")
    assert (behavior.name, extractor_of(behavior)) == ("fid@pixels", "pixels")
    assert extractor_of(get_behavior("fid")) == "default" and extractor_of(get_behavior("diversity")) == "blip"
    assert behavior.unit == get_behavior("fid").unit and behavior.higher_is_better is False
    assert behavior_variant(behavior, Pixels()) == "pixels 111111111111, as they are; sample covariance"


@pytest.mark.parametrize("name", ["fid@pixel", "fid@", "fid@pixels@clip", "fid@default"])
def test_unknown_extractors_list_the_known(name: str) -> None:
    with pytest.raises(ConfigError, match=r"blip, classifier, clip, inception, pixels, vgg16"):
        get_behavior(name)


def test_unknown_behaviors_of_known_extractors() -> None:
    with pytest.raises(ConfigError, match=r"Unknown behavior 'fyd'.*inception_score_N"):
        get_behavior("fyd@clip")


def test_one_pass_per_extractor_and_each_value_as_if_alone(images: Images) -> None:
    small, large = Pixels(1), Pixels(2)
    references = {"default": Reference.from_images(images[:30], small), "pixels": Reference.from_images(images, large)}
    small.n_passes = large.n_passes = 0
    behaviors = [get_behavior(name) for name in ("fid", "vendi@pixels", "kid", "fid@pixels")]
    both = {"default": small, "pixels": large}
    found = measure_behaviors(images[30:], behaviors, extractor=both, reference=references)
    assert (small.n_passes, large.n_passes) == (1, 1)
    assert list(found) == ["fid", "vendi@pixels", "kid", "fid@pixels"]
    for behavior in behaviors:
        name = extractor_of(behavior)
        alone = measure_behaviors(
            images[30:], [behavior], extractor={name: both[name]}, reference={name: references[name]}
        )
        assert alone == {behavior.name: found[behavior.name]}
    assert found["fid@pixels"] != found["fid"]


def test_two_names_of_one_network_are_one_pass(images: Images) -> None:
    extractor = Pixels()
    reference = Reference.from_images(images, extractor)
    extractor.n_passes = 0
    behaviors = [get_behavior("fid"), get_behavior("fid@pixels")]
    found = measure_behaviors(images, behaviors, extractor=extractor, reference=reference)
    assert extractor.n_passes == 1 and found["fid"] == found["fid@pixels"]


def test_behaviors_that_compare_with_nothing_need_no_reference(images: Images) -> None:
    for name in ("vendi", "aesthetic_score", "inception_score", "inception_score_10", "vendi@pixels"):
        assert not uses_reference(get_behavior(name))
    assert uses_reference(get_behavior("diversity")) and uses_reference(get_behavior("recall@clip"))
    assert measure_behaviors(images, [get_behavior("vendi")], extractor=Pixels())["vendi"] > 1


def test_what_is_missing_is_named_before_any_pass(images: Images) -> None:
    extractor = Pixels()
    reference = Reference.from_images(images, extractor)
    extractor.n_passes = 0
    fid = get_behavior("fid@pixels")
    with pytest.raises(ConfigError, match=r"'fid@clip' needs the feature extractor 'clip'; found default, pixels"):
        measure_behaviors(images, [fid, get_behavior("fid@clip")], extractor=extractor, reference=reference)
    with pytest.raises(ConfigError, match="as seen by 'pixels'; found default"):
        measure_behaviors(images, [fid], extractor=extractor, reference={"default": reference})
    with pytest.raises(MixedResultsError, match="reference made by 222222222222"):
        other = Reference.from_images(images, Pixels(2))
        measure_behaviors(images, [fid], extractor=extractor, reference={"pixels": other})
    assert extractor.n_passes == 0


def test_extractors_of_ones_own() -> None:
    assert "pixels" in extractor_names()
    assert load_extractor("pixels", FeatureConfig(batch_size=3)).fingerprint == "3" * 64
    for taken in ("pixels", "clip", "classifier", "default", "", "a@b", "a:b", "a,b"):
        with pytest.raises(ConfigError, match="must be new"):
            register_extractor(taken, "some.module:load")
    with pytest.raises(ConfigError, match=r"Unknown feature extractor 'clap'.*clip"):
        load_extractor("clap", FeatureConfig())
