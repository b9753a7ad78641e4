"""What one image is, apart from its place in a dataset: format, size, and two fingerprints to find it again by.

The perceptual hash has 128 bits: whether a pixel of a 9x9 grey thumbnail is darker than its right neighbour (64) and
than the one below (64). Recompression, scaling and changes of brightness flip few bits of it.

References:
    Krawetz (2013), Kind of Like That, for the difference hash.
"""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from tribute.data.decoding import DAMAGE, check_size, in_colour, open_image, what
from tribute.errors import DataError

THUMBNAIL_SIZE = 8

EXAMINATION = np.dtype(
    [
        ("format", "U12"),
        ("mode", "U8"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("pixels_sha256", "u1", 16),
        ("perceptual_hash", "<u8", 2),
        ("thumbnail", "u1", (THUMBNAIL_SIZE, THUMBNAIL_SIZE, 3)),
    ]
)
"""Format and mode as Pillow names them; size before the orientation is applied; half a SHA-256 over the RGB pixels."""


def examine_image(encoded: bytes) -> npt.NDArray[Any]:
    """Examine one image file.

    Returns:
        A record `()` of type `EXAMINATION`.

    Raises:
        DataError: It is no image, damaged, or too large.
    """
    from PIL import Image, ImageOps

    record = np.zeros((), dtype=EXAMINATION)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with open_image(encoded) as image:
                check_size(image.size)
                record["format"], record["mode"] = image.format or "", image.mode
                record["width"], record["height"] = image.size
                ImageOps.exif_transpose(image, in_place=True)
                rgb = in_colour(image, "RGB")
        except Image.DecompressionBombError as error:
            raise DataError(f"expected an image of a sound size, found a decompression bomb ({error})") from error
        except DAMAGE as error:
            raise DataError(f"expected an image, found bytes that cannot be decoded ({what(error)})") from error
    content = hashlib.sha256(f"{rgb.size}\n".encode())
    content.update(rgb.tobytes())
    record["pixels_sha256"] = np.frombuffer(content.digest()[:16], dtype=np.uint8)
    record["thumbnail"] = np.asarray(rgb.resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.LANCZOS))
    grey = np.asarray(rgb.convert("L").resize((9, 9), Image.Resampling.LANCZOS)).astype(np.int16)
    bits = np.stack([grey[:8, :8] < grey[:8, 1:], grey[:8, :8] < grey[1:, :8]])
    record["perceptual_hash"] = np.packbits(bits).view("<u8")
    return record
