"""Names, user functions, the one feature pass, and frozen references."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tribute.behaviors import base
from tribute.behaviors.base import (
    GLOBAL_BEHAVIORS,
    CallableBehavior,
    Reference,
    behavior_names,
    behavior_variant,
    get_behavior,
    measure_behaviors,
    register_behavior,
)
from tribute.behaviors.classifier import ClassifierExtractor
from tribute.behaviors.diversity import reference_clusters
from tribute.behaviors.features import Features
from tribute.errors import BehaviorError, ConfigError, MixedResultsError
from tribute.types import Images

Digits = tuple[Images, np.ndarray]

USER_MODULE = """
import numpy as np

def brightness(images): return images.mean()
def whole(images): return int(images.sum())
def nothing(images): return float("nan")
def words(images): return "bright"
def truth(images): return True
def broken(images): raise KeyError("no such key")
def vandal(images):
    images[:] = 0
    return 1.0
constant = 3.0
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "user_behaviors_for_test.py").write_text(USER_MODULE)
    (tmp_path / "user_behaviors_misspelt.py").write_text("def (:")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "user_behaviors_for_test"


@pytest.fixture
def images(digits: Digits) -> Images:
    return digits[0][:40]


class CountingExtractor:
    """Counts the passes of the extractor inside."""

    name = "classifier"

    def __init__(self, inside: ClassifierExtractor) -> None:
        self.inside, self.fingerprint, self.n_passes = inside, inside.fingerprint, 0

    def extract(self, images: Images, batch_size: int = 512) -> Features:
        self.n_passes += 1
        return self.inside.extract(images, batch_size)


@pytest.fixture
def counting(classifier: ClassifierExtractor) -> CountingExtractor:
    return CountingExtractor(classifier)


def test_names_aliases_and_directions() -> None:
    assert set(GLOBAL_BEHAVIORS) <= set(behavior_names())
    for name in GLOBAL_BEHAVIORS:
        behavior = get_behavior(name)
        assert behavior.name == name and behavior.min_images >= 1 and behavior.variant
        assert behavior.higher_is_better is (name not in ("fid", "kid"))
    for alias, name in {"is": "inception_score", "fid_value": "fid", "diversity_score": "entropy"}.items():
        assert get_behavior(alias).name == name


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ConfigError, match=r"'fyd'.*entropy.*fid_value.*module:function"):
        get_behavior("fyd")


def test_fixed_directions_cannot_be_turned() -> None:
    assert get_behavior("fid", higher_is_better=False).name == "fid"
    with pytest.raises(ConfigError, match="lower is better; found higher"):
        get_behavior("fid", higher_is_better=True)


def test_registered_behaviors_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    monkeypatch.setattr(base, "_ALIASES", dict(base._ALIASES))
    register_behavior("mean", lambda: CallableBehavior(lambda images: float(images.mean()), "mean"), aliases=["m"])
    assert get_behavior("m").name == "mean"
    for taken in ("mean", "m", "is", "a:b"):
        with pytest.raises(ConfigError, match=repr(taken)):
            register_behavior(taken, "some.module:Thing")


def test_one_feature_pass_for_all(images: Images, counting: CountingExtractor, reference: Reference) -> None:
    behaviors = [get_behavior(name) for name in GLOBAL_BEHAVIORS]
    values = measure_behaviors(images, behaviors, extractor=counting, reference=reference)
    assert counting.n_passes == 1
    assert tuple(values) == GLOBAL_BEHAVIORS
    alone = {b.name: measure_behaviors(images, [b], extractor=counting, reference=reference)[b.name] for b in behaviors}
    assert values == alone


def test_order_of_images_does_not_matter(digits: Digits, classifier, reference: Reference) -> None:
    behaviors = [get_behavior(name) for name in GLOBAL_BEHAVIORS]
    images = digits[0][100:400]
    there = measure_behaviors(images, behaviors, extractor=classifier, reference=reference)
    back = measure_behaviors(images[::-1], behaviors, extractor=classifier, reference=reference)
    assert back == pytest.approx(there, rel=1e-3)


def test_reference_statistics_are_computed_once(make_features) -> None:
    reference = Reference(make_features(np.eye(5)), extractor_fingerprint="made up")
    n_calls = 0

    def compute() -> dict[str, np.ndarray]:
        nonlocal n_calls
        n_calls += 1
        return {"sum": reference.features.embeddings.sum(axis=0)}

    assert reference.statistic("sum", compute) is reference.statistic("sum", compute)
    assert n_calls == 1


def test_too_few_images_are_found_before_the_pass(images, counting, reference: Reference) -> None:
    behaviors = [get_behavior("fid"), get_behavior("entropy")]
    with pytest.raises(BehaviorError, match=r"'entropy'.*at least 20 images; found 7"):
        measure_behaviors(images[:7], behaviors, extractor=counting, reference=reference)
    assert counting.n_passes == 0


def test_what_is_missing_or_does_not_fit_is_named(images, counting, reference: Reference) -> None:
    fid = get_behavior("fid")
    with pytest.raises(ConfigError, match=r"fid.*no extractor"):
        measure_behaviors(images, [fid])
    with pytest.raises(ConfigError, match="no reference"):
        measure_behaviors(images, [fid], extractor=counting)
    with pytest.raises(ConfigError, match=r"measured once.*fid, fid"):
        measure_behaviors(images, [fid, fid], extractor=counting, reference=reference)
    with pytest.raises(BehaviorError, match="uint8"):
        measure_behaviors(images[..., 0], [fid], extractor=counting, reference=reference)
    counting.fingerprint = "0" * 64
    with pytest.raises(MixedResultsError, match="000000000000"):
        measure_behaviors(images, [fid], extractor=counting, reference=reference)
    assert counting.n_passes == 0


def test_variant_names_the_extractor(classifier: ClassifierExtractor, user_module: str) -> None:
    found = behavior_variant(get_behavior("is"), classifier)
    assert found == f"classifier {classifier.fingerprint[:12]}; 1 split"
    own = get_behavior(f"{user_module}:brightness")
    assert behavior_variant(own, classifier) == own.variant != get_behavior(f"{user_module}:whole").variant


def test_user_function_needs_no_extractor(images: Images, user_module: str) -> None:
    behaviors = [get_behavior(f"{user_module}:brightness"), get_behavior(f"{user_module}:whole")]
    values = measure_behaviors(images, behaviors)
    assert values == {f"{user_module}:brightness": images.mean(), f"{user_module}:whole": images.sum()}
    assert all(type(value) is float for value in values.values())


def test_user_function_beside_others(images, counting, reference: Reference, user_module: str) -> None:
    before = images.copy()
    behaviors = [get_behavior(f"{user_module}:vandal"), get_behavior("fid")]
    values = measure_behaviors(images, behaviors, extractor=counting, reference=reference)
    assert values["fid"] > 0 and np.array_equal(images, before)


@pytest.mark.parametrize(
    ("suffix", "keyword", "expected"),
    [("", None, True), ("", False, False), (":lower", None, False), (":higher", True, True)],
)
def test_direction_of_user_functions(user_module, suffix: str, keyword: bool | None, expected: bool) -> None:
    behavior = get_behavior(f"{user_module}:brightness{suffix}", higher_is_better=keyword)
    assert behavior.higher_is_better is expected
    assert behavior.name == f"{user_module}:brightness"


def test_wrong_directions(user_module: str) -> None:
    with pytest.raises(ConfigError, match="State the direction once"):
        get_behavior(f"{user_module}:brightness:lower", higher_is_better=True)
    for name in (f"{user_module}:brightness:up", f"{user_module}:brightness:lower:lower"):
        with pytest.raises(ConfigError, match="module:function:lower; found"):
            get_behavior(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_here:f", "'no_such_module_here' cannot be imported.*PYTHONPATH"),
        ("user_behaviors_misspelt:f", "cannot be imported .SyntaxError"),
        ("user_behaviors_for_test:absent", "has no 'absent'"),
        ("user_behaviors_for_test:constant", "must be a function of images; found float"),
        (":f", "module '' cannot be imported"),
        ("user_behaviors_for_test:", "has no ''"),
    ],
)
@pytest.mark.usefixtures("user_module")
def test_user_functions_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(BehaviorError, match=message):
        get_behavior(name)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nothing", "must be a finite number; found nan for 40 images"),
        ("words", "must return a float; it returned str 'bright'"),
        ("truth", "must return a float; it returned bool"),
        ("broken", "raised KeyError: 'no such key'"),
    ],
)
def test_user_functions_that_fail(images, user_module: str, function: str, message: str) -> None:
    with pytest.raises(BehaviorError, match=f"'{user_module}:{function}' {message}"):
        measure_behaviors(images, [get_behavior(f"{user_module}:{function}")])


def test_frozen_reference_comes_back(digits: Digits, classifier, tmp_path: Path) -> None:
    images = digits[0][:300]
    reference = Reference.from_images(images, classifier)
    behaviors = [get_behavior(name) for name in GLOBAL_BEHAVIORS]
    measured = digits[0][300:500]
    expected = measure_behaviors(measured, behaviors, extractor=classifier, reference=reference)
    frozen = reference.save(tmp_path / "frozen")

    again = Reference.load(tmp_path / "frozen", images)
    again.statistic("moments", lambda: pytest.fail("computed again"))
    assert np.array_equal(reference_clusters(again)["labels"], reference_clusters(reference)["labels"])
    assert measure_behaviors(measured, behaviors, extractor=classifier, reference=again) == expected
    assert again.fingerprint == reference.fingerprint
    assert again.save(tmp_path / "copy") == frozen


def test_frozen_reference_is_never_overwritten_mixed_or_trusted_when_damaged(
    digits: Digits, classifier: ClassifierExtractor, classifier_cache: Path, tmp_path: Path
) -> None:
    images, folder = digits[0][:50], tmp_path / "frozen"
    reference = Reference.from_images(images, classifier)
    reference.save(folder)
    with pytest.raises(BehaviorError, match="never overwritten"):
        reference.save(folder)
    with pytest.raises(MixedResultsError, match="60 images, frozen with 50"):
        Reference.load(folder, digits[0][:60])
    with pytest.raises(MixedResultsError, match="other real images"):
        Reference.load(folder, images[::-1])
    with pytest.raises(BehaviorError, match="no frozen reference"):
        Reference.load(next(classifier_cache.iterdir()), images)
    payload = bytearray((folder / "arrays.safetensors").read_bytes())
    payload[-1] ^= 1
    (folder / "arrays.safetensors").write_bytes(payload)
    with pytest.raises(BehaviorError, match=r"damaged.*SHA-256"):
        Reference.load(folder, images)
    with pytest.raises(BehaviorError, match=r"damaged.*FileNotFoundError"):
        Reference.load(tmp_path / "absent", images)


def test_fingerprint_tells_images_and_extractors_apart(make_features: Callable[..., Features]) -> None:
    features = make_features(np.eye(4))
    other = Features(features.images + np.uint8(1), features.embeddings)
    found = {
        Reference(f, extractor_fingerprint=e).fingerprint for f, e in ((features, "a"), (features, "b"), (other, "a"))
    }
    assert len(found) == 3
