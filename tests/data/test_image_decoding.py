"""Every pixel mode becomes RGB or grey; the crop is ADM's."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsr_jax.data.base import UnreadableRecord
from dsr_jax.data.images import center_crop, decode_image


def encode(image: Image.Image, format_name: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def colours(size: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "width,height,size", [(50, 37, 8), (37, 90, 16), (40, 32, 16), (20, 13, 16), (16, 16, 16)]
)
def test_crop_is_adms(width: int, height: int, size: int) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    # Transcribed from ADM's image_datasets.py: an oracle, kept in its own words.
    expected = image
    while min(*expected.size) >= 2 * size:
        expected = expected.resize(tuple(x // 2 for x in expected.size), resample=Image.BOX)
    scale = size / min(*expected.size)
    expected = expected.resize(
        tuple(round(x * scale) for x in expected.size), resample=Image.BICUBIC
    )
    array = np.array(expected)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    np.testing.assert_array_equal(center_crop(image, size), array[y : y + size, x : x + size])


def test_rgb_and_alpha_keep_their_colours() -> None:
    rgb = colours()
    alpha = np.concatenate([rgb, np.zeros_like(rgb[..., :1])], axis=-1)
    for array in (rgb, alpha):
        decoded = decode_image(encode(Image.fromarray(array)), "x", 16, 3)
        np.testing.assert_array_equal(decoded, rgb)


def test_grey_is_repeated_or_kept() -> None:
    grey = colours()[..., 0]
    for mode in ("L", "LA"):
        content = encode(Image.fromarray(grey).convert(mode))
        np.testing.assert_array_equal(
            decode_image(content, "x", 16, 3), grey[..., None].repeat(3, -1)
        )
        np.testing.assert_array_equal(decode_image(content, "x", 16, 1), grey[..., None])


def test_sixteen_bits_keep_the_high_byte() -> None:
    grey = np.arange(0, 2**16, 256, dtype=np.uint16).reshape(16, 16)
    for format_name in ("PNG", "TIFF"):
        decoded = decode_image(encode(Image.fromarray(grey), format_name), "x", 16, 3)
        np.testing.assert_array_equal(decoded[..., 1], grey >> 8)


def test_palette_with_and_without_transparency() -> None:
    palette = Image.fromarray(colours()).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({}, {"transparency": bytes(range(16))}):
            content = encode(palette, **options)
            np.testing.assert_array_equal(decode_image(content, "x", 16, 3), expected)


def test_cmyk() -> None:
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    decoded = decode_image(encode(cmyk, "JPEG", quality=95), "x", 16, 3)
    np.testing.assert_allclose(decoded.mean((0, 1)), [254, 0, 0], atol=3)


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to view"
    rgb = colours()
    decoded = decode_image(encode(Image.fromarray(rgb), exif=exif), "x", 16, 3)
    np.testing.assert_array_equal(decoded, rgb)


@pytest.mark.parametrize("damage", ["empty", "text", "jpeg", "png", "float"])
def test_damage_is_reported_by_path(damage: str, tmp_path: Path) -> None:
    path = str(tmp_path / "bad.jpg")
    photo = Image.fromarray(colours(64))
    content = {
        "empty": b"",
        "text": b"<html>404</html>",
        "jpeg": encode(photo, "JPEG")[:-400],
        "png": encode(photo)[:-4000],
        "float": encode(Image.fromarray(np.zeros((16, 16), np.float32)), "TIFF"),
    }[damage]
    with pytest.raises(UnreadableRecord, match="bad.jpg.*cannot be decoded"):
        decode_image(content, path, 16, 3)
