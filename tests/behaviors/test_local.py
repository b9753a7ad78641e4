"""Local behaviors of pixels: laws, a naive twin, values of scikit-image; and their names."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tribute.behaviors.local import (
    PER_IMAGE,
    LocalBehavior,
    local_behaviors,
    mse,
    nrmse,
    parse_local,
    split_local,
    ssim,
)
from tribute.errors import BehaviorError, ConfigError
from tribute.seeding import numpy_stream
from tribute.types import Images

Compare = Callable[[Images, Images], np.ndarray]


def random_images(*shape: int) -> Images:
    return numpy_stream(0, "test-local", *shape).integers(0, 256, shape, dtype=np.uint8)


def noisy(images: Images, scale: int) -> Images:
    noise = numpy_stream(1, "test-local").integers(-scale, scale + 1, images.shape)
    return np.clip(images.astype(np.int64) + noise, 0, 255).astype(np.uint8)


# scikit-image 0.26.0 on digits 0 to 3 and 10 to 13: mean_squared_error of images in [0, 1], normalized_root_mse,
# structural_similarity with data_range=255 and channel_axis=-1.
SCIKIT_IMAGE = {
    mse: [0.03428849480968858, 0.07507400999615532, 0.14762471164936564, 0.05145905420991927],
    nrmse: [0.4278796872696597, 0.5406583212733348, 0.7425764631068352, 0.53450394310678],
    ssim: [0.8449919042001255, 0.7636457539952276, 0.4384250393153157, 0.747443704836493],
}


@pytest.mark.parametrize("compare", SCIKIT_IMAGE, ids=lambda item: item.__name__)
def test_values_are_those_of_scikit_image(compare: Compare, digit_images: Images) -> None:
    found = compare(digit_images[:4], digit_images[10:14])
    np.testing.assert_allclose(found, SCIKIT_IMAGE[compare], rtol=0, atol=1e-12)


def test_ssim_is_that_of_a_naive_twin() -> None:
    full, coalition = random_images(2, 9, 12, 3), noisy(random_images(2, 9, 12, 3), 60)
    c1, c2 = 2.55**2, 7.65**2
    for image in range(2):
        found = []
        for channel in range(3):
            for top in range(9 - 6):
                for left in range(12 - 6):
                    window = slice(top, top + 7), slice(left, left + 7), channel
                    x, y = full[image][window].ravel(), coalition[image][window].ravel()
                    covariance = np.cov(x, y)
                    structure = (2 * covariance[0, 1] + c2) / (np.trace(covariance) + c2)
                    means = (2 * x.mean() * y.mean() + c1) / (x.mean() ** 2 + y.mean() ** 2 + c1)
                    found.append(means * structure)
        np.testing.assert_allclose(ssim(full, coalition)[image], np.mean(found), atol=1e-12)


def test_an_image_is_like_itself(digit_images: Images) -> None:
    images = digit_images[:20]
    np.testing.assert_array_equal(mse(images, images), 0)
    np.testing.assert_array_equal(nrmse(images, images), 0)
    np.testing.assert_allclose(ssim(images, images), 1, atol=1e-12)


def test_mse_and_ssim_do_not_ask_which_model_is_which(digit_images: Images) -> None:
    full, coalition = digit_images[:20], digit_images[20:40]
    np.testing.assert_array_equal(mse(full, coalition), mse(coalition, full))
    np.testing.assert_allclose(ssim(full, coalition), ssim(coalition, full), atol=1e-12)
    assert np.all(np.abs(ssim(full, coalition)) <= 1)
    assert np.any(nrmse(full, coalition) != nrmse(coalition, full))


def test_more_noise_is_farther_away(digit_images: Images) -> None:
    images = digit_images[:50]
    scales = (0, 10, 30, 60, 120)
    for compare, sign in ((mse, 1), (nrmse, 1), (ssim, -1)):
        averages = [sign * compare(images, noisy(images, scale)).mean() for scale in scales]
        assert np.all(np.diff(averages) > 0), compare


def test_images_are_compared_one_by_one(digit_images: Images) -> None:
    full, coalition = digit_images[:6], digit_images[6:12]
    for compare in (mse, nrmse, ssim):
        together = compare(full, coalition)
        assert together.shape == (6,)
        assert together.dtype == np.float64
        alone = [compare(full[i : i + 1], coalition[i : i + 1])[0] for i in range(6)]
        np.testing.assert_allclose(together, alone, rtol=0, atol=1e-14)


def test_a_black_image_has_a_relative_error_only_where_nothing_differs() -> None:
    black, grey = np.zeros((2, 8, 8, 1), np.uint8), np.full((2, 8, 8, 1), 9, np.uint8)
    np.testing.assert_array_equal(nrmse(black, black), 0)
    np.testing.assert_array_equal(nrmse(grey, black), 1)
    with pytest.raises(BehaviorError, match=r"image 0 is black.*avg_mse"):
        nrmse(black, grey)


@pytest.mark.parametrize(
    ("compare", "full", "coalition", "message"),
    [
        (ssim, np.zeros((1, 6, 8, 1), np.uint8), np.zeros((1, 6, 8, 1), np.uint8), "7x7.*found images of 6x8"),
        (mse, np.zeros((2, 8, 8, 1), np.uint8), np.zeros((1, 8, 8, 1), np.uint8), "one shape"),
        (ssim, np.zeros((1, 8, 8, 1)), np.zeros((1, 8, 8, 1)), "uint8"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    compare: Compare, full: np.ndarray, coalition: np.ndarray, message: str
) -> None:
    with pytest.raises(BehaviorError, match=message):
        compare(full, coalition)


def test_names_are_the_published_ones() -> None:
    names = [behavior.name for behavior in local_behaviors(["local"], 2)]
    assert names[:5] == ["avg_mse", "avg_nrmse", "avg_ssim", "avg_total_loss", "avg_elbo_loss"]
    assert names[5:10] == [f"generated_image_0_{quantity}" for quantity in PER_IMAGE]
    assert len(names) == len(set(names)) == 5 + 2 * 5
    for behavior in local_behaviors(["local"], 12):
        assert parse_local(behavior.name) == behavior


@pytest.mark.parametrize(
    "name", ["mse", "avg_diffusion", "generated_image_01_mse", "generated_image_-1_mse", "generated_image_0_fid", "fid"]
)
def test_other_names_are_not_local(name: str) -> None:
    assert parse_local(name) is None
    with pytest.raises(ConfigError, match="avg_mse"):
        local_behaviors([name], 3)


def test_local_names_are_told_from_others_and_named_once() -> None:
    local, others = split_local(["fid", "avg_mse", "my:function", "local", "generated_image_3_ssim"])
    assert local == ("avg_mse", "local", "generated_image_3_ssim")
    assert others == ("fid", "my:function")
    assert local_behaviors(["avg_ssim", "generated_image_1_mse", "avg_ssim"], 2) == [
        LocalBehavior("ssim"),
        LocalBehavior("mse", 1),
    ]
    assert len(local_behaviors(["avg_mse", "local"], 3)) == 5 * 4
    with pytest.raises(ConfigError, match=r"generated_image_3_ssim: images 0 to 2.*--n_local_samples"):
        local_behaviors(["generated_image_3_ssim"], 3)


def test_better_is_nearer_to_the_full_model() -> None:
    assert {name: LocalBehavior(name).higher_is_better for name in PER_IMAGE} == {
        name: name == "ssim" for name in PER_IMAGE
    }


def test_an_average_is_that_of_the_images() -> None:
    values = {"mse": np.array([1.0, 2.0, 6.0])}
    assert LocalBehavior("mse").value(values) == 3.0
    assert LocalBehavior("mse", 2).value(values) == 6.0
