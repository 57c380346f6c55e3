"""Resamples images and tables exactly like the original code's primitives.

Each is a pair of matrices, one per axis, built in float64 on the host. `jax.image.resize` has no
mode for the first, PyTorch's bicubic interpolation without antialiasing.

Source: spec encoder 2.
"""

import functools

import jax.numpy as jnp
import numpy as np

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array

METHODS = ("bicubic", "bicubic-offset", "bicubic-antialias", "bilinear")
_OFFSET = 0.1


def resample(x: Array, height: int, width: int, method: str) -> Array:
    """Resizes [..., H, W, C] to [..., height, width, C] in float32.

    Args:
      x: Values on a grid of half-pixel centres.
      height: Output rows.
      width: Output columns.
      method: "bicubic" (a = -0.75, no antialiasing: RAE's input, position tables of SigLIP, MAE and
        transformers' DINOv2 without registers), "bicubic-offset" (the same as if a tenth of a pixel
        more were wanted: torch.hub's DINOv2), "bicubic-antialias" (a = -0.5: DINOv2 with
        registers) or "bilinear" (no antialiasing).

    Raises:
      ConfigError: If the method is unknown.
    """
    if x.shape[-3:-1] == (height, width):
        return x
    rows = resample_matrix(x.shape[-3], height, method)
    columns = resample_matrix(x.shape[-2], width, method)
    x = jnp.einsum("ih,...hwc->...iwc", rows, x.astype(jnp.float32), precision="highest")
    return jnp.einsum("jw,...iwc->...ijc", columns, x, precision="highest")


@functools.cache
def resample_matrix(size: int, wanted: int, method: str) -> np.ndarray:
    """Returns the matrix [wanted, size], float32, that resizes one axis.

    Raises:
      ConfigError: If the method is unknown.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown resampling {method!r}", f"choose from {', '.join(METHODS)}")
    build = _antialiased if method == "bicubic-antialias" else _pointwise
    matrix = build(size, wanted, method).astype(np.float32)
    matrix.flags.writeable = False
    return matrix


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Returns Keys' cubic kernel with parameter `a`."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _pointwise(size: int, wanted: int, method: str) -> np.ndarray:
    """Returns weights of the taps around each output's center; the edges are repeated."""
    cubic = method != "bilinear"
    span = wanted + _OFFSET if method == "bicubic-offset" else wanted
    centres = (np.arange(wanted) + 0.5) * size / span - 0.5
    if not cubic:
        centres = np.maximum(centres, 0.0)
    offsets = np.arange(-1, 3) if cubic else np.arange(2)
    first = np.floor(centres)
    distances = centres[:, None] - (first[:, None] + offsets)
    if cubic:
        weights = _cubic(distances, -0.75)
    else:
        weights = 1 - np.abs(distances)
    taps = np.clip(first[:, None] + offsets, 0, size - 1).astype(int)
    matrix = np.zeros((wanted, size))
    np.add.at(matrix, (np.arange(wanted)[:, None], taps), weights)
    return matrix


def _antialiased(size: int, wanted: int, method: str) -> np.ndarray:
    """Returns weights of a cubic kernel as wide as an output, renormalized at the edges."""
    del method
    centres = (np.arange(wanted)[:, None] + 0.5) * size / wanted
    stretch = max(size / wanted, 1.0)
    taps = np.arange(size)[None]
    first = np.maximum(np.floor(centres - 2 * stretch + 0.5), 0)
    last = np.minimum(np.floor(centres + 2 * stretch + 0.5), size)
    weights = _cubic((taps + 0.5 - centres) / stretch, -0.5)
    weights = np.where((taps >= first) & (taps < last), weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)
