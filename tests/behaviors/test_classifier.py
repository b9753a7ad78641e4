"""The classifier is accurate, deterministic, cached safely, and leaves the process as it was."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from tribute.behaviors import classifier as module
from tribute.behaviors import classifier_training as training
from tribute.behaviors.classifier import ClassifierExtractor, train_or_load_classifier
from tribute.behaviors.classifier_networks import (
    PHOTOGRAPHS,
    PLAIN,
    SMALL_PHOTOGRAPHS,
    Architecture,
    ClassifierRecipe,
    recipe_for,
)
from tribute.behaviors.features import read_artifact
from tribute.errors import BehaviorError, DataError
from tribute.types import Images

QUICK = ClassifierRecipe(n_epochs=1, min_steps=6, batch_size=32)
QUICK_PHOTOGRAPHS = dataclasses.replace(PHOTOGRAPHS, batch_size=32, min_steps=30, max_steps=30)
NAMES = [str(digit) for digit in range(10)]
Digits = tuple[Images, np.ndarray]


def quick(digits: Digits, cache_dir: Path | None = None, seed: int = 0) -> ClassifierExtractor:
    images, labels = digits[0][:200], digits[1][:200]
    return train_or_load_classifier(images, labels, label_names=NAMES, cache_dir=cache_dir, seed=seed, recipe=QUICK)


def test_digits_are_told_apart(classifier: ClassifierExtractor) -> None:
    assert classifier.held_out_accuracy >= 0.97
    assert 350 <= classifier.n_held_out <= 370
    assert classifier.label_names == tuple(NAMES)


def test_reported_accuracy_is_that_of_this_network(digits: Digits, classifier: ClassifierExtractor) -> None:
    images, labels = digits
    held_out = training.held_out_mask(labels, 0.2, seed=0)
    probabilities = classifier.extract(images[held_out]).probabilities
    assert probabilities is not None
    assert (probabilities.argmax(axis=1) == labels[held_out]).mean() == classifier.held_out_accuracy


def test_held_out_part_is_stratified() -> None:
    labels = np.repeat([0, 1, 2], [100, 50, 2])
    held_out = training.held_out_mask(labels, 0.2, seed=3)
    assert np.bincount(labels[held_out]).tolist() == [20, 10, 1]


def test_probabilities_and_embeddings(digits: Digits, classifier: ClassifierExtractor) -> None:
    found = classifier.extract(digits[0][:70])
    assert found.embeddings.shape == (70, 64) and found.embeddings.dtype == np.float32
    assert found.probabilities is not None
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1.0, rtol=1e-5)


def test_a_row_depends_on_its_image_only(digits: Digits, classifier: ClassifierExtractor) -> None:
    images = digits[0][:65]
    whole = classifier.extract(images)
    backwards = classifier.extract(images[::-1], batch_size=8)
    np.testing.assert_allclose(whole.embeddings, backwards.embeddings[::-1], rtol=1e-4, atol=1e-5)


def test_training_is_deterministic_and_leaves_global_randomness_alone(digits: Digits) -> None:
    torch.manual_seed(1)
    first = quick(digits)
    torch.manual_seed(2)
    before, before_numpy = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
    second = quick(digits)
    assert torch.equal(torch.get_rng_state(), before)
    assert str(np.random.get_state()) == before_numpy  # noqa: NPY002
    assert first.fingerprint == second.fingerprint
    assert quick(digits, seed=1).fingerprint != first.fingerprint


def test_loaded_from_cache_without_training(digits: Digits, tmp_path: Path, monkeypatch) -> None:
    first = quick(digits, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["arrays.safetensors", "facts.json"]
    assert quick(digits).fingerprint == first.fingerprint  # the same without a cache
    monkeypatch.setattr(module, "train_classifier", lambda *args: pytest.fail("trained again"))
    again = quick(digits, tmp_path)
    assert again.fingerprint == first.fingerprint
    assert again.held_out_accuracy == first.held_out_accuracy
    sample = digits[0][:9]
    assert np.array_equal(again.extract(sample).embeddings, first.extract(sample).embeddings)


def test_cache_tells_data_seeds_and_recipes_apart(digits: Digits, tmp_path: Path) -> None:
    images, labels = digits[0][:200].copy(), digits[1][:200]
    quick((images, labels), tmp_path)
    quick((images, labels), tmp_path, seed=1)
    images[0, 0, 0, 0] += 1
    quick((images, labels), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def flip_a_byte(folder: Path) -> None:
    path = folder / "arrays.safetensors"
    payload = bytearray(path.read_bytes())
    payload[-5] ^= 1
    path.write_bytes(payload)


def cut_the_json(folder: Path) -> None:
    path = folder / "facts.json"
    path.write_text(path.read_text()[:-20])


def embellish_the_accuracy(folder: Path) -> None:
    path = folder / "facts.json"
    record = json.loads(path.read_text())
    record["facts"]["held_out_accuracy"] = 0.999
    path.write_text(json.dumps(record))


def lose_the_weights(folder: Path) -> None:
    (folder / "arrays.safetensors").unlink()


@pytest.mark.parametrize("damage", [flip_a_byte, cut_the_json, embellish_the_accuracy, lose_the_weights])
def test_damaged_cache_is_noticed_kept_aside_and_replaced(digits, tmp_path, caplog, damage) -> None:
    first = quick(digits, tmp_path)
    (folder,) = tmp_path.iterdir()
    damage(folder)
    with caplog.at_level(logging.WARNING):
        again = quick(digits, tmp_path)
    assert "is damaged" in caplog.text and str(folder) in caplog.text
    assert again.fingerprint == first.fingerprint
    assert again.held_out_accuracy == first.held_out_accuracy
    assert len(list(tmp_path.glob("*.damaged-*"))) == 1
    read_artifact(folder)


@pytest.mark.parametrize(
    "shape", [(32, 32, 3), (28, 28, 1), (2, 2, 1), (64, 48, 3), (128, 64, 3), (17, 19, 3), (65, 64, 3)]
)
def test_other_image_sizes(shape: tuple[int, int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (24, *shape), dtype=np.uint8)
    images[12:] //= 4
    recipe = dataclasses.replace(recipe_for(shape, 24), min_steps=4, max_steps=4, batch_size=12)
    labels = np.repeat([0, 1], 12)
    found = train_or_load_classifier(images, labels, label_names=["light", "dark"], cache_dir=None, recipe=recipe)
    assert found.extract(images).embeddings.shape == (24, recipe.embedding_width)


def stripes(n_images: int, side: int) -> Digits:
    """Colour images of noisy stripes, level in one class and upright in the other."""
    stream = np.random.default_rng(0)
    labels = np.arange(n_images) % 2
    waves = 60 * np.sin(np.arange(side) * 1.5 + stream.uniform(0, 6, (n_images, 1)))[:, :, None, None]
    waves = np.where(labels[:, None, None, None] == 0, waves, waves.swapaxes(1, 2))
    return np.uint8(128 + waves + stream.uniform(-40, 40, (n_images, side, side, 3))), labels  # pyright: ignore


def quick_photographs(side: int = 16, n_images: int = 200) -> ClassifierExtractor:
    images, labels = stripes(n_images, side)
    names = ["level", "upright"]
    return train_or_load_classifier(images, labels, label_names=names, cache_dir=None, recipe=QUICK_PHOTOGRAPHS)


def test_photographs_are_told_apart_the_same_every_time() -> None:
    found = quick_photographs()
    assert found.held_out_accuracy >= 0.9
    assert quick_photographs().fingerprint == found.fingerprint


def test_a_row_of_photographs_depends_on_its_image_only() -> None:
    found, images = quick_photographs(), stripes(65, 16)[0]
    whole, backwards = found.extract(images), found.extract(images[::-1], batch_size=8)
    assert whole.embeddings.shape == (65, 128)
    np.testing.assert_allclose(whole.embeddings, backwards.embeddings[::-1], rtol=1e-4, atol=1e-5)
    assert whole.probabilities is not None and backwards.probabilities is not None
    np.testing.assert_allclose(whole.probabilities, backwards.probabilities[::-1], rtol=1e-4, atol=1e-5)


def test_photographs_come_back_from_the_cache(tmp_path: Path, monkeypatch) -> None:
    images, labels = stripes(60, 16)
    recipe = dataclasses.replace(QUICK_PHOTOGRAPHS, max_steps=2)
    args = {"label_names": ["level", "upright"], "cache_dir": tmp_path, "recipe": recipe}
    first = train_or_load_classifier(images, labels, **args)
    monkeypatch.setattr(module, "train_classifier", lambda *args: pytest.fail("trained again"))
    again = train_or_load_classifier(images, labels, **args)
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.extract(images).embeddings, first.extract(images).embeddings)


@pytest.mark.parametrize(("side", "factor"), [(16, 1), (33, 1), (64, 2)])
def test_whitened_patches_are_uncorrelated(side: int, factor: int) -> None:
    images = np.random.default_rng(1).integers(0, 256, (300, side, side, 3), dtype=np.uint8)
    images[..., 1] = images[..., 0] // 2 + images[..., 1] // 2
    rows = np.arange(300)
    architecture = Architecture((side, side, 3), 2, 8, *training.pixel_moments(images, rows), stage_widths=(8, 8))
    network = architecture.build()
    training._whiten(network, architecture, images, rows, seed=0)
    layers = list(network["trunk"].children())[: 2 if factor == 1 else 3]
    with torch.no_grad():
        found = torch.nn.Sequential(*layers)(architecture.pixels(images, "cpu"))
    assert found.shape == (300, 24, side // factor, side // factor)
    whitened = found[:, :12].permute(1, 0, 2, 3).flatten(1)
    np.testing.assert_allclose(whitened @ whitened.T / whitened.shape[1], np.eye(12), atol=0.01)
    assert torch.equal(found[:, 12:], -found[:, :12])


def test_convolutions_begin_by_handing_their_inputs_on() -> None:
    convolution = torch.nn.Conv2d(3, 5, 3, padding=1, bias=False)
    training._pass_through(torch.nn.ModuleDict({"trunk": convolution}))
    pixels = torch.rand(2, 3, 6, 6)
    found = convolution(pixels)
    torch.testing.assert_close(found[:, :3], pixels)
    assert found[:, 3:].abs().min() > 0


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((8, 8, 1), PLAIN),
        ((8, 8, 3), PLAIN),
        ((28, 28, 1), PLAIN),
        ((16, 16, 3), SMALL_PHOTOGRAPHS),
        ((32, 32, 3), PHOTOGRAPHS),
        ((64, 80, 3), PHOTOGRAPHS),
    ],
)
def test_recipe_follows_the_images(shape: tuple[int, int, int], expected: ClassifierRecipe) -> None:
    assert recipe_for(shape, 50_000) == expected
    few = recipe_for(shape, 2_000)
    assert few.stage_widths == expected.stage_widths and few.batch_size == 128


def test_fields_of_later_versions_leave_older_keys_alone() -> None:
    """The published studies of digits rest on networks that are kept, and named, by these."""
    assert json.dumps(PLAIN.identity) == (
        '{"embedding_width": 64, "batch_size": 128, "n_epochs": 40, "min_steps": 300, "max_steps": 1500, '
        '"learning_rate": 0.003, "weight_decay": 0.05, "held_out_share": 0.2, "version": 1}'
    )
    plain = Architecture((8, 8, 1), 10, 64, (1.0,), (2.0,))
    assert list(plain.identity) == ["image_shape", "n_classes", "embedding_width", "pixel_mean", "pixel_sd"]
    assert "stage_widths" in PHOTOGRAPHS.identity
    assert Architecture.from_stored(json.loads(json.dumps(plain.identity))) == plain


@pytest.mark.parametrize(
    ("accuracy", "n_classes", "poor"), [(0.7, 2, True), (0.8, 2, False), (0.54, 10, True), (0.56, 10, False)]
)
def test_a_poor_classifier_is_named_in_a_warning(accuracy: float, n_classes: int, poor: bool, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        training._warn_if_poor(accuracy, n_classes)
    assert ("rest on it say little" in caplog.text) == poor


def test_training_says_how_long_it_still_takes(digits: Digits, caplog, monkeypatch) -> None:
    monkeypatch.setattr(training, "_SECONDS_BETWEEN_REPORTS", 0.0)
    with caplog.at_level(logging.INFO):
        quick(digits)
    assert "step 6 of 6, about 0 s left" in caplog.text


@pytest.mark.parametrize("n_channels", [1, 3])
def test_augmentation_shifts_within_reach_and_mirrors_only_colour(n_channels: int) -> None:
    pixels = torch.rand(40, n_channels, 16, 8, generator=torch.Generator().manual_seed(0))
    augmented = training.augment(pixels, seed=0, step=5)
    assert torch.equal(augmented, training.augment(pixels, seed=0, step=5))
    found = set()
    for image, shifted in zip(pixels.numpy(), augmented.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (2, 2), (1, 1)), mode="edge")
        matches = {
            (top, left, mirrored)
            for top in range(5)
            for left in range(3)
            for mirrored in (False, True)
            if np.array_equal(padded[:, top : top + 16, left : left + 8][..., :: -1 if mirrored else 1], shifted)
        }
        assert len(matches) == 1
        found |= matches
    assert {top for top, _, _ in found} == set(range(5))
    assert {left for _, left, _ in found} == set(range(3))
    assert {mirrored for _, _, mirrored in found} == ({False, True} if n_channels == 3 else {False})


def test_pixel_moments_are_those_of_numpy(digits: Digits) -> None:
    rows = np.arange(0, 1797, 3)
    mean, sd = training.pixel_moments(digits[0], rows)
    np.testing.assert_allclose([*mean, *sd], [digits[0][rows].mean(), digits[0][rows].std()], rtol=1e-12)


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (np.zeros(7, int), ["a", "b"], "one integer label for each of 8"),
        (np.zeros(8), ["a", "b"], "one integer label"),
        (np.array([0, 1] * 3 + [2, -1]), ["a", "b", "c"], r"0\.\.2.*-1\.\.2"),
        (np.array([0, 1] * 4), ["a"], r"0\.\.0"),
        (np.array([0] * 7 + [1]), ["a", "b"], r"too few images of \['b'\]"),
        (np.zeros(8, int), ["a"], "at least 2 classes"),
    ],
)
def test_labels_that_do_not_fit(labels: np.ndarray, names: list[str], message: str) -> None:
    images = np.zeros((8, 8, 8, 1), np.uint8)
    with pytest.raises(DataError, match=message):
        train_or_load_classifier(images, labels, label_names=names, cache_dir=None)


def test_images_that_do_not_fit(classifier: ClassifierExtractor) -> None:
    with pytest.raises(BehaviorError, match=r"\(8, 8, 1\).*\(32, 32, 3\)"):
        classifier.extract(np.zeros((2, 32, 32, 3), np.uint8))
    with pytest.raises(BehaviorError, match=r"uint8.*float64"):
        classifier.extract(np.zeros((2, 8, 8, 1)))  # pyright: ignore[reportArgumentType]
