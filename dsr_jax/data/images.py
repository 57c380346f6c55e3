"""From the bytes of one image file to a square uint8 array."""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

from dsr_jax.data.base import UnreadableRecord

if TYPE_CHECKING:
    from PIL import Image


def decode_image(
    data: bytes, origin: str, image_size: int, channels: int, *, fit: str = "crop"
) -> np.ndarray:
    """Decodes an image file and brings it to a square.

    Orientation tags (EXIF) are not applied, as in the original.

    Args:
      data: The file's content, in any format that Pillow reads.
      origin: What to call the file in an error: its path.
      image_size: Side of the result.
      channels: 3 for colour, 1 for grey.
      fit: A name in FITS.

    Returns:
      uint8 [image_size, image_size, channels], or larger with "short_side".

    Raises:
      UnreadableRecord: Naming `origin`, if the content is damaged or no image.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return FITS[fit](image, image_size, channels)
    # All of these are what Pillow's plugins raise on damaged files; none is a bug of ours.
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise UnreadableRecord(
            f"image {origin} cannot be decoded: {error}",
            "repair or delete it, or set config.data.on_corrupt=skip",
        ) from error


def crop_image(image: Image.Image, image_size: int, channels: int) -> np.ndarray:
    """Converts an image to `channels` and crops it to a square.

    Returns:
      uint8 [image_size, image_size, channels].
    """
    return _as_array(center_crop(_to_mode(image, channels), image_size))


def squash_image(image: Image.Image, image_size: int, channels: int) -> np.ndarray:
    """Converts an image to `channels` and resizes it to a square, whatever its proportions.

    Returns:
      uint8 [image_size, image_size, channels].

    Source: transformers SiglipImageProcessor; spec encoder 6.
    """
    from PIL import Image

    size = (image_size, image_size)
    return _as_array(_to_mode(image, channels).resize(size, Image.Resampling.BILINEAR))


def resize_short_side(image: Image.Image, image_size: int, channels: int) -> np.ndarray:
    """Converts an image to `channels` and resizes it, keeping its proportions.

    Returns:
      uint8 [H, W, channels], the smaller side being `image_size`.

    Source: torchvision Resize; spec encoder 8.
    """
    from PIL import Image

    short = min(image.size)
    width, height = (int(image_size * side / short) for side in image.size)
    return _as_array(_to_mode(image, channels).resize((width, height), Image.Resampling.BICUBIC))


FITS = {"crop": crop_image, "squash": squash_image, "short_side": resize_short_side}
"""How an image becomes one of a given size: its centre, all of it distorted, or all of it with the
shorter side of that size."""


def _as_array(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def center_crop(image: Image.Image, image_size: int) -> Image.Image:
    """Crops the central square after shrinking the short side to `image_size`.

    Halving with a box filter first keeps the bicubic filter's support small on large photographs;
    the result depends on it, so reference statistics fit only this recipe.

    Source: ADM image_datasets.py center_crop_arr; spec denoiser 8.
    """
    from PIL import Image

    while min(image.size) >= 2 * image_size:
        width, height = image.size
        image = image.resize((width // 2, height // 2), resample=Image.Resampling.BOX)
    scale = image_size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))


def _to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Converts any mode to L or RGB; an alpha channel is dropped, as in the original."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255, which turns nearly all of the image white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixel mode {image.mode!r} has no defined range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if channels == 1 else "RGB")
