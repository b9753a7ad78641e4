"""The digits that come with scikit-learn: no files, no download."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tribute.types import Images

IMAGE_SHAPE = (8, 8, 1)


@dataclass(frozen=True, eq=False)
class Digits:
    """The scans in the order of scikit-learn.

    Attributes:
        images: `(n_examples, 8, 8, 1)` uint8.
        labels: `(n_examples,)` int64.
        label_names: `0` to `9`.
    """

    images: Images
    labels: npt.NDArray[np.int64]
    label_names: tuple[str, ...]


def read_digits(max_examples: int | None) -> Digits:
    """The first scans, or all 1,797; their 17 grey levels 0 to 16 become 0 to 255, rounded."""
    from sklearn.datasets import load_digits

    levels, classes = load_digits(return_X_y=True)
    images = np.round(np.asarray(levels) * (255 / 16)).astype(np.uint8).reshape(-1, *IMAGE_SHAPE)
    labels = np.asarray(classes, dtype=np.int64)
    return Digits(images[:max_examples], labels[:max_examples], tuple(str(digit) for digit in range(10)))
