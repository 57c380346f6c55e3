"""Images for files: floats to uint8, grids, PNG."""

import io
import math
import os
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.files import write_atomic
from dsr_jax.core.typing import Array

UINT8_MODES = ("truncate", "round", "sit")


def to_uint8(images: Array, mode: str = "truncate") -> Array:
    """Maps float images in [0, 1] to uint8, any shape.

    Args:
      images: Float values; values outside [0, 1] are clipped.
      mode: "truncate" is the official code of RAE and DSR (half a gray level darker on average),
        "round" takes the nearest level, "sit" is 127.5 x + 128 on [-1, 1], truncated, of SiT and
        DiT (rounds halves up). The choice moves FID, so it is part of the recipe.

    Source: RAE sample_ddp.py, SiT sample_ddp.py; spec evaluation 2.

    Raises:
      ConfigError: For an unknown mode.
    """
    images = jnp.asarray(images, jnp.float32)
    if mode == "truncate":
        return (jnp.clip(images, 0, 1) * 255).astype(jnp.uint8)
    if mode == "round":
        return jnp.round(jnp.clip(images, 0, 1) * 255).astype(jnp.uint8)
    if mode == "sit":
        return jnp.clip(127.5 * (images * 2 - 1) + 128, 0, 255).astype(jnp.uint8)
    raise ConfigError(f"unknown uint8 mode {mode!r}", f"choose from {', '.join(UINT8_MODES)}")


def image_grid(images: np.ndarray, columns: int | None = None, gap: int = 0) -> np.ndarray:
    """Lays images [N, H, W, C] out row by row on one black canvas [rows * H, columns * W, C].

    Args:
      images: uint8 images.
      columns: Images per row; by default as square as possible.
      gap: Black pixels between images.

    Raises:
      ValueError: If there is no image.
    """
    images = np.asarray(images)
    count, height, width, channels = images.shape
    if not count:
        raise ValueError("a grid needs at least one image")
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    tiles = np.zeros((rows * columns, height + gap, width + gap, channels), images.dtype)
    tiles[:count, :height, :width] = images
    canvas = tiles.reshape(rows, columns, height + gap, width + gap, channels)
    canvas = canvas.swapaxes(1, 2).reshape(rows * (height + gap), columns * (width + gap), channels)
    return canvas[: canvas.shape[0] - gap, : canvas.shape[1] - gap]


def save_png_grid(
    path: str | os.PathLike[str],
    images: np.ndarray,
    labels: Sequence[int | str] | np.ndarray | None = None,
    *,
    columns: int | None = None,
    scale: int | None = None,
    row_names: Sequence[str] = (),
) -> None:
    """Writes a grid of uint8 images [N, H, W, C] as PNG, atomically.

    Args:
      path: Path of the file.
      images: Gray (C = 1) or color (C = 3) images.
      labels: Class numbers or texts [N] to write above the images.
      columns: Images per row.
      scale: Factor of enlargement by nearest neighbor; by default what brings images to a height
        of at least 32 pixels, so that 8x8 digits are visible; of 144 under texts.
      row_names: Names to write to the left of the rows; () for none.
    """
    from PIL import Image

    texts = labels is not None and any(isinstance(label, str) for label in labels)
    scale = scale or max(1, math.ceil((144 if texts else 32) / images.shape[1]))
    tiles = np.asarray(images).repeat(scale, axis=1).repeat(scale, axis=2)
    if tiles.shape[-1] == 1:
        tiles = tiles.repeat(3, axis=-1)
    if labels is not None:
        tiles = np.concatenate([_captions(labels, tiles.shape[2]), tiles], axis=1)
    encoded = io.BytesIO()
    canvas = image_grid(tiles, columns, gap=2)
    if row_names:
        canvas = name_rows(canvas, row_names)
    Image.fromarray(canvas).save(encoded, format="PNG")
    write_atomic(path, encoded.getvalue())


def name_rows(canvas: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Returns a picture [H, W, 3] of equally high rows with their names to the left, uint8."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(13)
    width = 12 + math.ceil(max(font.getlength(name) for name in names))
    margin = Image.new("RGB", (width, canvas.shape[0]))
    draw, height = ImageDraw.Draw(margin), canvas.shape[0] / len(names)
    for row, name in enumerate(names):
        middle = (row + 0.5) * height
        draw.text((width - 6, middle), name, fill=(255, 255, 255), font=font, anchor="rm")
    return np.concatenate([np.asarray(margin), canvas], axis=1)


def _captions(labels: Sequence[int | str] | np.ndarray, width: int) -> np.ndarray:
    """Strips [N, 12 times the lines, width, 3] with class numbers or texts in white on black."""
    from PIL import Image, ImageDraw, ImageFont

    measure = ImageFont.load_default().getlength
    texts = [_wrap(str(label), lambda text: measure(text) < width - 2) for label in labels]
    height = 12 * max(len(lines) for lines in texts)
    strips = []
    for lines in texts:
        strip = Image.new("RGB", (width, height))
        for row, line in enumerate(lines):
            ImageDraw.Draw(strip).text((1, 12 * row), line, fill=(255, 255, 255))
        strips.append(np.asarray(strip))
    return np.stack(strips)


def _wrap(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Breaks a text between words into lines that fit, where single words do."""
    lines = [""]
    for word in text.split() or [""]:
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and not fits(longer):
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
