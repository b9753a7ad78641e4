"""From the bytes of an image file to pixels: one rule for every image of a format in `FORMATS`.

The rule, in this order. The size in the header is checked before any pixel is decoded. Of an animation the first frame
counts. The orientation in the EXIF data is applied. Sixteen bits per channel are scaled to eight, transparency is
composited on white, and palettes, CMYK and other colour spaces become RGB, or grey where one channel is asked for;
colour profiles are ignored. Then `center_crop` cuts the largest square out of the middle, or `squash` takes the whole
image, and Pillow's bicubic filter resizes it; that filter widens with the reduction, so nothing aliases. An image that
already has the size is not resampled: its pixels stay as they are.

References:
    Parmar, Zhang and Zhu (2022), On aliased resizing and surprising subtleties in GAN evaluation, for the filter.
"""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tribute.errors import DataError
from tribute.types import Images

if TYPE_CHECKING:
    from PIL import Image

Resize = Literal["center_crop", "squash"]

RULE_VERSION = 1
"""Part of every cache's key: raise it when the rule changes, and everything is decoded anew."""

MAX_PIXELS = 89_478_485
"""Images of more pixels are refused: the limit from which Pillow warns of a decompression bomb, 256 MiB as RGB."""

# Pillow knows more, but the files are untrusted: EPS is a program that Ghostscript would run, WMF needs Windows, others
# are stubs or decoders that hardly anybody uses. TGA comes last: without a signature, any bytes might be one.
FORMATS = (
    *("PNG", "JPEG", "MPO", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "PPM", "JPEG2000", "ICO", "PCX", "QOI", "SGI"),
    "TGA",
)
"""What an image file may be, as Pillow names it; all but those that this Pillow was built without."""

# What Pillow's decoders and EXIF reader raise on damaged bytes. The one of AVIF raises RuntimeError.
DAMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, OverflowError, RuntimeError),
    struct.error,
)


@dataclass(frozen=True)
class ImageRule:
    """What every image becomes: `(image_size, image_size, n_channels)` uint8.

    Attributes:
        image_size: Height and width, pixels.
        n_channels: 3 for RGB, 1 for grey.
        resize: `center_crop` cuts the largest square out of the middle, `squash` changes the aspect ratio.
    """

    image_size: int
    n_channels: int = 3
    resize: Resize = "center_crop"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        return self.image_size, self.image_size, self.n_channels

    def describe(self) -> dict[str, Any]:
        """All that the pixels depend on besides the bytes and the version of Pillow, as JSON."""
        return {**asdict(self), "version": RULE_VERSION}


def decode_image(encoded: bytes, rule: ImageRule) -> Images:
    """Decode one image file by the rule of this module.

    Returns:
        `(image_size, image_size, n_channels)` uint8.

    Raises:
        DataError: It is no image, damaged, too large, or of more than 16 bits per channel. The message does not
            say which file it is: callers know.
    """
    from PIL import Image

    with warnings.catch_warnings():
        # Our own limit is an error; and odd metadata is no reason to warn about an image that can be read.
        warnings.simplefilter("ignore")
        try:
            with open_image(encoded) as image:
                check_size(image.size)
                return _pixels(image, rule)
        except Image.DecompressionBombError as error:
            raise DataError(f"expected an image of at most {MAX_PIXELS:,} pixels, found more ({error})") from error
        except DAMAGE as error:
            raise DataError(f"expected an image, found bytes that cannot be decoded ({what(error)})") from error


def open_image(encoded: bytes) -> Image.Image:
    """Open an image file of one of the `FORMATS`, and call no decoder of another; nothing is decoded yet."""
    from PIL import Image

    Image.init()
    return Image.open(io.BytesIO(encoded), formats=[name for name in FORMATS if name in Image.OPEN])


def image_endings() -> frozenset[str]:
    """How names of such files end, with the dot and in small letters."""
    from PIL import Image

    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS)


def what(error: Exception) -> str:
    """What a decoder says, without the address of the buffer that Pillow names instead of a file."""
    from PIL import UnidentifiedImageError

    return f"of none of the formats {', '.join(FORMATS)}" if isinstance(error, UnidentifiedImageError) else str(error)


def check_size(size: tuple[int, int]) -> None:
    """Refuse a decompression bomb by the width and height in its header."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"expected an image of at most {MAX_PIXELS:,} pixels, found {width}x{height}, perhaps a decompression "
            "bomb; scale it down if you trust it"
        )


def _pixels(image: Image.Image, rule: ImageRule) -> Images:
    from PIL import Image, ImageOps

    ImageOps.exif_transpose(image, in_place=True)  # or it copies every image, turned or not
    image = in_colour(image, "RGB" if rule.n_channels == 3 else "L")
    size = (rule.image_size, rule.image_size)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC, box=_crop_box(image.size, rule.resize))
    return np.asarray(image).reshape(rule.shape)


def _crop_box(size: tuple[int, int], resize: Resize) -> tuple[int, int, int, int]:
    """Left, upper, right, lower edge of the part that is kept; on odd differences the left or upper one."""
    width, height = size
    if resize == "squash":
        return 0, 0, width, height
    side = min(size)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side


def in_colour(image: Image.Image, mode: str) -> Image.Image:
    """The image in mode RGB or L."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits (mode I;16, or I in older Pillow) with levels 0 to 65535 scaled to 0 to 255."""
    from PIL import Image

    levels = np.asarray(image)
    if levels.dtype.kind not in "iu" or not 0 <= levels.min() <= levels.max() <= 65_535:
        raise DataError(f"expected 8 or 16 bits per channel, found Pillow's mode {image.mode}; convert it to 8 bits")
    return Image.fromarray(np.round(levels / 257).astype(np.uint8))
