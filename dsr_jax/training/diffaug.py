"""Differentiable augmentation of a discriminator's inputs: translation, color, cutout.

Source: Zhao et al. 2020 (DiffAugment), RAE stage1/disc/diffaug.py; spec encoder 10.
"""

import jax
import jax.numpy as jnp

from dsr_jax.core.typing import Array

NUM_UNIFORMS = 7
"""Uniforms per sample: shift down, right; brightness, saturation, contrast; hole down, right."""

_SHIFT_SHARE = 8
"""Images move by up to this fraction of their side."""


def augment(images: Array, uniforms: Array, cutout: float = 0.0) -> Array:
    """Moves images, changes their colors, and cuts holes into them.

    Args:
      images: [B, H, W, C], around zero.
      uniforms: Uniforms in [0, 1), [B, NUM_UNIFORMS].
      cutout: Side of the hole as a share of the image's; 0 for none.

    Returns:
      Images of the same shape; zero where nothing is left.
    """
    out = translate(images, uniforms[:, 0], uniforms[:, 1])
    out = change_colors(out, uniforms[:, 2], uniforms[:, 3], uniforms[:, 4])
    return cut_out(out, uniforms[:, 5], uniforms[:, 6], cutout) if cutout else out


def translate(images: Array, down: Array, right: Array) -> Array:
    """Moves each image by up to an eighth of its side; zeros come in.

    Args:
      images: [B, H, W, C].
      down: Uniforms [B] that decide the rows.
      right: Uniforms [B] that decide the columns.
    """

    def one(image: Array, shifts: tuple[Array, Array]) -> Array:
        for axis, shift in enumerate(shifts):
            size = image.shape[axis]
            positions = jnp.arange(size) + shift
            image = jnp.take(image, positions, axis=axis, mode="clip")
            inside = (positions >= 0) & (positions < size)
            image = jnp.where(jnp.expand_dims(inside, (1 - axis, 2)), image, 0)
        return image

    shifts = []
    for size, uniform in zip(images.shape[1:3], (down, right), strict=True):
        largest = round(size / _SHIFT_SHARE)
        shifts.append(jnp.floor(uniform * (2 * largest + 1)).astype(jnp.int32) - largest)
    return jax.vmap(one)(images, (shifts[0], shifts[1]))


def change_colors(images: Array, brightness: Array, saturation: Array, contrast: Array) -> Array:
    """Adds to images [B, H, W, C], spreads channels about their mean, then all about theirs.

    Each takes uniforms [B].
    """
    brightness, saturation, contrast = (
        uniform[:, None, None, None] for uniform in (brightness, saturation, contrast)
    )
    images = images + (brightness - 0.5)
    gray = jnp.mean(images, axis=-1, keepdims=True)
    images = (images - gray) * (2 * saturation) + gray
    level = jnp.mean(images, axis=(1, 2, 3), keepdims=True)
    return (images - level) * (contrast + 0.5) + level


def cut_out(images: Array, down: Array, right: Array, share: float) -> Array:
    """Sets one rectangle of each image [B, H, W, C] to zero.

    Its rows and columns beyond the image fall onto the edge, as in the original.

    Args:
      images: The images.
      down: Uniforms [B] that decide its rows.
      right: Uniforms [B] that decide its columns.
      share: Side of the hole, as a fraction of the image's.
    """
    inside = []
    for size, uniform in zip(images.shape[1:3], (down, right), strict=True):
        hole = round(size * share)
        first = jnp.floor(uniform * (size + 1 - hole % 2)).astype(jnp.int32) - hole // 2
        positions = jnp.clip(first[:, None] + jnp.arange(hole), 0, size - 1)  # [B, hole]
        inside.append(jnp.any(positions[..., None] == jnp.arange(size), axis=1))
    rows, columns = inside
    return jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], 0, images)
