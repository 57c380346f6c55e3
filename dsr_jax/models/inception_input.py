"""Prepares images for Inception: 299 x 299 pixels, in the original's range.

Source: TensorFlow 1's ResizeBilinear, pytorch-fid; spec evaluation 3.
"""

import functools

import jax.numpy as jnp
import numpy as np

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array

INPUT_SIZE = 299
RESIZES = ("adm", "pytorch_fid")


@functools.cache
def _table(size: int, wanted: int, centered: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns lower and upper source index and the upper one's weight of `wanted` pixels.

    In float32 like the original; in float64 some weights differ by thousandths of a level.
    """
    scale, half = np.float32(size) / np.float32(wanted), np.float32(0.5)
    position = np.arange(wanted, dtype=np.float32)
    position = np.maximum((position + half) * scale - half, 0) if centered else position * scale
    low = np.floor(position).astype(np.int32)
    return low, np.minimum(low + 1, size - 1), position - low.astype(np.float32)


def resize_bilinear(images: Array, size: int = INPUT_SIZE, centered: bool = False) -> Array:
    """Applies TensorFlow 1's ResizeBilinear, [B, H, W, C] to [B, size, size, C], float32.

    Corners are not aligned, half-pixel centers are used only if `centered` (as in PyTorch), and
    there is no antialiasing.
    """
    x = jnp.asarray(images, jnp.float32)
    for axis in (2, 1):  # Columns first; the order decides the last bit.
        low, high, weight = _table(x.shape[axis], size, centered)
        weight = weight.reshape(-1, *(1,) * (3 - axis))
        first = jnp.take(x, low, axis=axis)
        x = first + (jnp.take(x, high, axis=axis) - first) * weight
    return x


def prepare(images: Array, resize: str = "adm") -> Array:
    """Maps uint8 images [B, H, W, 1 or 3] to the network's input [B, 299, 299, 3], float32.

    Args:
      images: Values 0 to 255; gray is repeated.
      resize: "adm" is TensorFlow 1's resize, and (x - 128) / 128. "pytorch_fid" uses
        half-pixel centers and maps to [-1, 1], like that package; its FIDs differ.

    Raises:
      ConfigError: For an unknown resize.
    """
    if resize not in RESIZES:
        raise ConfigError(f"unknown resize {resize!r}", f"choose from {', '.join(RESIZES)}")
    if images.shape[-1] == 1:
        images = jnp.repeat(images, 3, axis=-1)
    if resize == "pytorch_fid":
        return 2 * resize_bilinear(images.astype(jnp.float32) / 255, centered=True) - 1
    return (resize_bilinear(images) - 128) * 0.0078125
