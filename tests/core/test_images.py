"""Image files of every kind are decoded to RGB or grayscale like Pillow and torchvision do."""

import io
import os
import socket
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from dsr_jax.core.errors import DataError, UnreadableRecord
from dsr_jax.core.images import (
    MAX_PIXELS,
    decode,
    find_folders,
    find_image_files,
    to_array,
)


def encode(image: Image.Image, format_name: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def colors(size: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def pixels(content: bytes, channels: int = 3) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return to_array(decode(content, "x", channels))


def test_rgb_is_unchanged_and_alpha_is_dropped() -> None:
    rgb = colors()
    alpha = np.concatenate([rgb, np.zeros_like(rgb[..., :1])], axis=-1)
    for array in (rgb, alpha):
        np.testing.assert_array_equal(pixels(encode(Image.fromarray(array))), rgb)


def test_grayscale_is_repeated_or_kept() -> None:
    gray = colors()[..., 0]
    for mode in ("L", "LA"):
        content = encode(Image.fromarray(gray).convert(mode))
        np.testing.assert_array_equal(pixels(content), gray[..., None].repeat(3, -1))
        np.testing.assert_array_equal(pixels(content, 1), gray[..., None])
    luma = np.asarray(Image.fromarray(colors()).convert("L"))
    np.testing.assert_array_equal(pixels(encode(Image.fromarray(colors())), 1)[..., 0], luma)


def test_one_bit_is_black_and_white() -> None:
    bits = colors()[..., 0] > 127
    for options in ({"format_name": "PNG"}, {"format_name": "TIFF"}):
        found = pixels(encode(Image.fromarray(bits), **options))
        np.testing.assert_array_equal(found[..., 0], bits * np.uint8(255))


def test_sixteen_bits_keep_the_high_byte() -> None:
    gray = np.random.default_rng(0).integers(0, 2**16, (16, 16), dtype=np.uint16)
    raw = b"P5 16 16 65535\n" + gray.astype(">u2").tobytes()
    contents = [encode(Image.fromarray(gray), kind) for kind in ("PNG", "TIFF")]
    for content in (*contents, raw):
        for channels in (1, 3):
            found = pixels(content, channels)
            assert found.shape == (16, 16, channels)
            np.testing.assert_array_equal(found[..., -1], gray >> 8)


def test_palettes_with_and_without_transparency() -> None:
    palette = Image.fromarray(colors()).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    for options in ({}, {"transparency": bytes(range(16))}, {"transparency": 3}):
        np.testing.assert_array_equal(pixels(encode(palette, **options)), expected)
    np.testing.assert_array_equal(pixels(encode(palette, "GIF")), expected)


def test_cmyk_is_converted_as_by_pillow() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    np.testing.assert_allclose(
        pixels(encode(red, "JPEG", quality=95)).mean((0, 1)), [254, 0, 0], atol=3
    )
    ink = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    image = Image.frombytes("CMYK", (16, 16), ink.tobytes())
    np.testing.assert_array_equal(pixels(encode(image, "TIFF")), np.asarray(image.convert("RGB")))


def test_color_profiles_and_orientation_are_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to view"
    rgb = colors()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    content = encode(Image.fromarray(rgb), exif=exif, icc_profile=profile)
    np.testing.assert_array_equal(pixels(content), rgb)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_of_several_frames_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), shade) for shade in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    np.testing.assert_array_equal(pixels(content), np.asarray(frames[0]))


@pytest.mark.parametrize("damage", ["empty", "text", "jpeg", "png", "float", "integer"])
def test_damage_is_reported_by_path(damage: str) -> None:
    image = Image.fromarray(colors(64))
    content = {
        "empty": b"",
        "text": b"<html>404</html>",
        "jpeg": encode(image, "JPEG")[:-400],
        "png": encode(image)[:-4000],
        "float": encode(Image.fromarray(np.zeros((16, 16), np.float32)), "TIFF"),
        "integer": encode(Image.fromarray(np.zeros((16, 16), np.int32)), "TIFF"),
    }[damage]
    with pytest.raises(UnreadableRecord, match="images/bad.jpg cannot be decoded: (?!.*BytesIO)"):
        decode(content, "images/bad.jpg")


@pytest.mark.parametrize("size", [(60_000, 60_000), (MAX_PIXELS // 1024 + 1, 1024)])
def test_images_beyond_the_limit_are_refused_before_they_are_decoded(size: tuple[int, int]) -> None:
    content = bytearray(encode(Image.new("1", (16, 16))))
    content[16:24] = b"".join(side.to_bytes(4, "big") for side in size)
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    with pytest.raises(UnreadableRecord, match="large.png cannot be decoded: .*pixels"):
        decode(bytes(content), "large.png")


def test_only_image_files_are_listed(tmp_path: Path) -> None:
    wanted = ["a.png", "b/B.JPEG", "b/c/d.webp", "b-c/e.png"]
    others = [
        ".DS_Store",
        "._a.png",
        "@eaDir/a.png/t.jpg",
        "__MACOSX/._a.png",
        "b/x.txt",
        "Thumbs.db",
    ]
    for name in (*wanted, *others, "b/.hidden/f.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    (tmp_path / "b" / "c" / "here").symlink_to(".")
    os.mkfifo(tmp_path / "b" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket.png"))
    assert find_image_files(tmp_path) == wanted
    assert find_folders(tmp_path) == ["b", "b-c"]
    assert find_folders(tmp_path / "b") == ["c"]
    (tmp_path / "b" / "gone.png").symlink_to("nowhere")
    (tmp_path / "linked").symlink_to("b-c")
    assert find_image_files(tmp_path) == [
        *wanted[:2],
        "b/c/d.webp",
        "b/gone.png",
        "b-c/e.png",
        "linked/e.png",
    ]
    with pytest.raises(DataError, match="none cannot be listed"):
        find_folders(tmp_path / "none")
