"""One rule from image files to pixels: modes, orientation, transparency, size, damage."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from tribute.data.decoding import ImageRule, decode_image
from tribute.data.examination import examine_image
from tribute.errors import DataError
from tribute.seeding import numpy_stream

RULE = ImageRule(16)
PIXELS = numpy_stream(0, "test.decoding").integers(0, 256, (16, 16, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(pixels: np.ndarray) -> bytes:
    return encoded(Image.fromarray(pixels))


def test_an_image_that_has_the_size_keeps_its_pixels() -> None:
    for resize in ("center_crop", "squash"):
        assert np.array_equal(decode_image(png(PIXELS), ImageRule(16, resize=resize)), PIXELS)


def test_grey_becomes_three_equal_channels_and_colour_becomes_grey() -> None:
    grey = PIXELS[..., 0]
    assert np.array_equal(decode_image(png(grey), RULE), np.repeat(grey[..., None], 3, axis=2))
    expected = np.asarray(Image.fromarray(PIXELS).convert("L"))[..., None]
    assert np.array_equal(decode_image(png(PIXELS), ImageRule(16, n_channels=1)), expected)


def test_transparency_shows_white_behind_it() -> None:
    alpha = np.zeros((16, 16), np.uint8)
    alpha[:8] = 255
    image = decode_image(png(np.dstack([PIXELS, alpha])), RULE)
    assert np.array_equal(image[:8], PIXELS[:8]) and (image[8:] == 255).all()


def test_a_palette_with_a_transparent_colour_shows_white() -> None:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (0, 0, 16, 4))
    pixels = decode_image(encoded(image, transparency=0), RULE)
    assert (pixels[:4] == [0, 0, 255]).all() and (pixels[4:] == 255).all()


def test_sixteen_bits_are_scaled_to_eight() -> None:
    levels = np.linspace(0, 65_535, 256).astype(np.uint16).reshape(16, 16)
    image = decode_image(png(levels), ImageRule(16, n_channels=1))
    assert np.array_equal(image[..., 0], np.round(levels / 257).astype(np.uint8))
    assert image.min() == 0 and image.max() == 255


def test_floating_point_levels_are_refused() -> None:
    tiff = encoded(Image.fromarray(np.zeros((16, 16), np.float32)), "TIFF")
    with pytest.raises(DataError, match="8 or 16 bits per channel, found Pillow's mode F"):
        decode_image(tiff, RULE)


def test_cmyk_becomes_rgb() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    image = decode_image(encoded(red, "TIFF"), RULE)
    assert (image == [255, 0, 0]).all()


def test_the_orientation_of_a_camera_is_applied_before_the_crop() -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, :8] = 255  # the left third, which is at the top after a quarter turn to the right
    exif = Image.Exif()
    exif[0x0112] = 6
    image = decode_image(encoded(Image.fromarray(wide), exif=exif), ImageRule(8, resize="squash"))
    assert (image[:2] > 250).all() and (image[-4:] < 5).all()


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode_image(gif, RULE) == [255, 0, 0]).all()


def test_crop_takes_the_middle_and_squash_takes_all() -> None:
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = PIXELS
    assert np.array_equal(decode_image(png(pixels), RULE), PIXELS)
    squashed = decode_image(png(pixels), ImageRule(16, resize="squash"))
    assert (squashed[:, :4] < 60).all() and squashed[:, 6:10].mean() > 90
    assert np.array_equal(decode_image(png(pixels.transpose(1, 0, 2)), RULE), PIXELS.transpose(1, 0, 2))


def test_nothing_aliases() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255  # at a sixteenth of the size without a filter: all black
    image = decode_image(png(stripes), RULE)
    assert np.abs(image.astype(int) - 127.5).max() <= 8


TRUNCATED_JPEG = encoded(Image.fromarray(np.kron(PIXELS, np.ones((8, 8, 1), np.uint8))), "JPEG")[:2000]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be decoded"),
        (b"GIF89a", "cannot be decoded"),
        (TRUNCATED_JPEG, "cannot be decoded.*truncated"),
        (png(PIXELS)[:-100], "cannot be decoded"),
        (png(np.zeros((10_000, 9_000), np.uint8)), "at most 89,478,485 pixels, found 9000x10000"),
        (png(np.zeros((14_000, 14_000), np.uint8)), "at most 89,478,485 pixels"),
    ],
)
def test_damage_and_bombs_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode_image(content, RULE)


def test_eps_never_reaches_ghostscript(monkeypatch: pytest.MonkeyPatch) -> None:
    eps = encoded(Image.fromarray(PIXELS), "EPS")
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("called Ghostscript"))
    for read in (examine_image, lambda content: decode_image(content, RULE)):
        with pytest.raises(DataError, match="of none of the formats PNG, JPEG"):
            read(eps)


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PCX", "PPM", "TGA", "TIFF", "WEBP", "MPO"])
def test_usual_formats_are_read_and_their_damage_is_named(kind: str) -> None:
    try:
        content = encoded(Image.fromarray(np.kron(PIXELS, np.ones((8, 8, 1), np.uint8))), kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow has no {kind}")
    assert decode_image(content, RULE).shape == (16, 16, 3)
    for spoilt in (content[: len(content) // 2], content[:200] + bytes(len(content) - 200)):
        # Zeros may be an image; what matters is that nothing else is raised.
        try:
            decode_image(spoilt, RULE)
            examine_image(spoilt)
        except DataError as error:
            assert "cannot be decoded" in str(error)


def test_a_damaged_avif_is_named() -> None:
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    content = bytearray(encoded(Image.fromarray(np.kron(PIXELS, np.ones((8, 8, 1), np.uint8))), "AVIF"))
    start = content.find(b"mdat") + 8
    content[start : start + 100] = b"\xff" * 100
    with pytest.raises(RuntimeError), Image.open(io.BytesIO(content)) as image:
        image.load()
    for read in (examine_image, lambda content: decode_image(content, RULE)):
        with pytest.raises(DataError, match="cannot be decoded"):
            read(bytes(content))


def test_a_bomb_is_refused_before_a_pixel_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = png(np.zeros((10_000, 9_000), np.uint8))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded a bomb"))
    with pytest.raises(DataError, match="decompression bomb"):
        decode_image(bomb, RULE)
