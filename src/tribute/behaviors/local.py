"""Local behaviors: how near a coalition's model stays to the full model, image by image.

Both models start from the same noise, so image i of one is to be compared with image i of the other. Names and scale
are those of the published implementation: pixels in [0, 1], `avg_mse`, `generated_image_0_ssim`, and so on. Here are
the names, what they mean, and what pixels alone tell; denoising losses come from `tribute.diffusion.local_loss`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tribute.errors import BehaviorError, ConfigError
from tribute.types import Images

LOCAL = "local"
"""Stands for all averages and all values of single images."""

PER_IMAGE = ("mse", "nrmse", "ssim", "diffusion_loss", "elbo_loss")
"""What is measured of every image; `elbo_loss` is ours, the others have published keys."""

LOSSES = ("diffusion_loss", "elbo_loss")
"""Those that need the coalition's model, not only its images."""

SSIM_WINDOW = 7
"""Side of the square window of `ssim`, in pixels."""

PerImage = npt.NDArray[np.float64]
"""`(n_images,)`."""

_AVERAGE_NAMES = {name: f"avg_{name}" for name in PER_IMAGE} | {"diffusion_loss": "avg_total_loss"}
_QUANTITY_OF_AVERAGE = {name: quantity for quantity, name in _AVERAGE_NAMES.items()}
_SINGLE = re.compile(rf"generated_image_(0|[1-9]\d*)_({'|'.join(PER_IMAGE)})")
_UNITS = {"elbo_loss": "nats per dimension"}


@dataclass(frozen=True)
class LocalBehavior:
    """One quantity of one image, or its average over all images that are compared.

    Attributes:
        quantity: One of `PER_IMAGE`.
        image_idx: Number of the image; None for the average.
    """

    quantity: str
    image_idx: int | None = None

    @property
    def name(self) -> str:
        """The key under which the value is stored."""
        if self.image_idx is None:
            return _AVERAGE_NAMES[self.quantity]
        return f"generated_image_{self.image_idx}_{self.quantity}"

    @property
    def unit(self) -> str:
        """Unit of the value; empty if it has none."""
        return _UNITS.get(self.quantity, "")

    @property
    def higher_is_better(self) -> bool:
        """The direction; better is nearer to the full model."""
        return self.quantity == "ssim"

    def value(self, per_image: Mapping[str, PerImage]) -> float:
        """The value, from those of all images by quantity."""
        values = per_image[self.quantity]
        return float(values.mean() if self.image_idx is None else values[self.image_idx])


def parse_local(name: str) -> LocalBehavior | None:
    """The local behavior of this name; None if it is not the name of one."""
    if name in _QUANTITY_OF_AVERAGE:
        return LocalBehavior(_QUANTITY_OF_AVERAGE[name])
    if found := _SINGLE.fullmatch(name):
        return LocalBehavior(found[2], int(found[1]))
    return None


def split_local(names: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of local behaviors, `local` among them, and all other names; both in the given order."""
    names = tuple(names)
    local = tuple(name for name in names if name == LOCAL or parse_local(name) is not None)
    return local, tuple(name for name in names if name not in local)


def local_behaviors(
    names: Sequence[str], n_images: int, *, undefined: Mapping[str, str] | None = None
) -> list[LocalBehavior]:
    """The behaviors that some names mean, each once; `local` means the averages, then all single images.

    Args:
        names: Each is `local` or the name of a local behavior.
        n_images: Images that are compared.
        undefined: Quantities that these images or models do not have, with the reason; `local` leaves them out.

    Raises:
        ConfigError: An image that is not among them, a quantity that is undefined, or a name that is no local
            behavior's.
    """
    undefined = undefined or {}
    quantities = [quantity for quantity in PER_IMAGE if quantity not in undefined]
    found: dict[LocalBehavior, None] = {}
    for name in names:
        if name == LOCAL:
            found |= dict.fromkeys(LocalBehavior(quantity) for quantity in quantities)
            found |= dict.fromkeys(LocalBehavior(quantity, i) for i in range(n_images) for quantity in quantities)
            continue
        behavior = parse_local(name)
        if behavior is None:
            raise ConfigError(
                f"expected {LOCAL}, {', '.join(_QUANTITY_OF_AVERAGE)} or generated_image_NUMBER_QUANTITY; "
                f"found {name!r}"
            )
        if behavior.quantity in undefined:
            raise ConfigError(f"{name}: {behavior.quantity} is not defined here: {undefined[behavior.quantity]}")
        if behavior.image_idx is not None and behavior.image_idx >= n_images:
            raise ConfigError(
                f"{name}: images 0 to {n_images - 1} are compared; choose one of them, or compare more "
                "(--n_local_samples, local.n_samples of a study)"
            )
        found[behavior] = None
    return list(found)


def mse(full: Images, coalition: Images) -> PerImage:
    """Mean squared difference of pixels in [0, 1], image by image.

    Args:
        full: `(n_images, height, width, channels)` uint8, by the full model.
        coalition: The same, by the coalition's model.
    """
    _check_pair(full, coalition)
    return _mean_square(_unit_range(full) - _unit_range(coalition))


def nrmse(full: Images, coalition: Images) -> PerImage:
    """Root mean squared difference, as a share of the root mean square of the full model's image.

    That is scikit-image's `normalized_root_mse` with its default `normalization="euclidean"`, which the published
    implementation uses. Not symmetric in the two models.

    Raises:
        BehaviorError: An image of the full model is black, and the coalition's is not.
    """
    difference = np.sqrt(mse(full, coalition))
    scale = np.sqrt(_mean_square(_unit_range(full)))
    undefined = np.flatnonzero((scale == 0) & (difference > 0))
    if len(undefined):
        raise BehaviorError(
            f"nrmse divides by the full model's image; image {undefined[0]} is black. Leave nrmse out, e.g. "
            "--model_behavior avg_mse,avg_ssim, or train the full model for longer"
        )
    return np.divide(difference, scale, out=np.zeros_like(difference), where=scale > 0)


def ssim(full: Images, coalition: Images) -> PerImage:
    """Structural similarity, in [-1, 1], image by image; 1 for equal images.

    The mean over channels and over all 7x7 windows that lie within the image, each weighted evenly, with unbiased
    variances, K1 = 0.01, K2 = 0.03 and a range of 255: scikit-image's `structural_similarity(..., data_range=255,
    channel_axis=-1)`, which the published implementation uses.

    Raises:
        BehaviorError: The images are smaller than the window.

    References:
        Wang, Bovik, Sheikh and Simoncelli (2004), eq. 13.
    """
    _check_pair(full, coalition)
    height, width = full.shape[1:3]
    if min(height, width) < SSIM_WINDOW:
        raise BehaviorError(
            f"ssim compares windows of {SSIM_WINDOW}x{SSIM_WINDOW} pixels; found images of {height}x{width}. "
            "Leave ssim out, e.g. --model_behavior avg_mse,avg_nrmse"
        )
    x, y = full.astype(np.float64), coalition.astype(np.float64)
    mean_x, mean_y = _window_means(x), _window_means(y)
    n_pixels = SSIM_WINDOW**2
    unbiased = n_pixels / (n_pixels - 1)
    var_x = unbiased * (_window_means(x * x) - mean_x**2)
    var_y = unbiased * (_window_means(y * y) - mean_y**2)
    cov = unbiased * (_window_means(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similarity.mean(axis=(1, 2, 3))


PIXEL_QUANTITIES: Mapping[str, Callable[[Images, Images], PerImage]] = {"mse": mse, "nrmse": nrmse, "ssim": ssim}
"""Those that need images alone."""


def _window_means(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Means over all windows within the image, `(n, height - 6, width - 6, channels)`."""
    from scipy.ndimage import uniform_filter

    margin = SSIM_WINDOW // 2
    means = uniform_filter(values, size=SSIM_WINDOW, axes=(1, 2))
    return means[:, margin:-margin, margin:-margin]


def _unit_range(images: Images) -> npt.NDArray[np.float64]:
    return images.astype(np.float64) / 255


def _mean_square(values: npt.NDArray[np.float64]) -> PerImage:
    return np.square(values).mean(axis=(1, 2, 3))


def _check_pair(full: Images, coalition: Images) -> None:
    if full.shape != coalition.shape or full.ndim != 4 or full.dtype != np.uint8 or coalition.dtype != np.uint8:
        raise BehaviorError(
            "expected uint8 images (n_images, height, width, channels) of both models, of one shape; found "
            f"{full.shape} {full.dtype} and {coalition.shape} {coalition.dtype}"
        )
