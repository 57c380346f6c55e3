"""Resizing and cropping of images to a given size."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from dsr_jax.core.errors import DataError
from dsr_jax.core.images import check_size, decode, to_array, unreadable

if TYPE_CHECKING:
    from PIL import Image


def decode_image(
    data: bytes, origin: str, image_size: int, channels: int, *, fit: str = "center_crop"
) -> np.ndarray:
    """Decodes an image file by the rules of `core.images` and brings it to a size.

    Args:
      data: The file's content, in any format that Pillow reads.
      origin: Path of the file, for error messages.
      image_size: Side of the result.
      channels: 3 for RGB, 1 for gray.
      fit: A name in FITS.

    Returns:
      uint8 [image_size, image_size, channels]; with "resize_shorter_side" the other side is longer.

    Raises:
      UnreadableRecord: Naming `origin`, if the content is damaged, no image or too large.
    """
    image = decode(data, origin, channels)
    try:
        return to_array(FITS[fit](image, image_size))
    except ValueError as error:
        raise unreadable(origin, error) from error


def center_crop(image: Image.Image, image_size: int) -> Image.Image:
    """Crops the central square after shrinking the shorter side to `image_size`.

    Halving with a box filter first keeps the bicubic filter's support small on large images;
    the result depends on it, so reference statistics fit only this recipe.

    Source: ADM image_datasets.py center_crop_arr; spec denoiser 8.
    """
    from PIL import Image

    while min(image.size) >= 2 * image_size:
        width, height = image.size
        image = image.resize((width // 2, height // 2), resample=Image.Resampling.BOX)
    scale = image_size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    check_size(width, height)
    image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))


def squash(image: Image.Image, image_size: int) -> Image.Image:
    """Resizes an image to a square, ignoring its proportions.

    Source: transformers SiglipImageProcessor; spec encoder 6.
    """
    from PIL import Image

    return image.resize((image_size, image_size), Image.Resampling.BILINEAR)


def resize_shorter_side(image: Image.Image, image_size: int) -> Image.Image:
    """Resizes an image to a shorter side of `image_size`, keeping its proportions.

    Source: torchvision Resize; spec encoder 8.
    """
    from PIL import Image

    shorter = min(image.size)
    width, height = (int(image_size * side / shorter) for side in image.size)
    check_size(width, height)
    return image.resize((width, height), Image.Resampling.BICUBIC)


FITS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "center_crop": center_crop,
    "squash": squash,
    "resize_shorter_side": resize_shorter_side,
}
"""How an image becomes one of a given size: its center, all of it distorted, or all of it with the
shorter side of that size."""

_OLD_FITS = {"crop": "center_crop", "short_side": "resize_shorter_side"}


def fit_name(name: str) -> str:
    """Returns the name in FITS that `name` or its older form stands for.

    Raises:
      DataError: If there is none.
    """
    name = _OLD_FITS.get(name, name)
    if name not in FITS:
        raise DataError(f"no fit of images is called {name!r}", f"choose from {', '.join(FITS)}")
    return name
