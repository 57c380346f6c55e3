"""Two-dimensional rotary position embedding with unrotated leading tokens.

Source: DSR lightningDiT.py (VisionRotaryEmbeddingFast); spec denoiser 1.8.
"""

import jax.numpy as jnp
import numpy as np

from dsr_jax.core.typing import Array
from dsr_jax.models.tuning import tuning


def rope_tables(head_dim: int, grid: int, num_prefix: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns cosines and sines for a row-major square grid after `num_prefix` unrotated tokens.

    The first half of the head's channels rotates by the row, the second by the column; each angle
    is listed twice, for the two channels of an interleaved pair.

    Args:
      head_dim: Channels K of one head, a multiple of 4.
      grid: Tokens along one side.
      num_prefix: Tokens in front; their rows are the identity rotation.

    Returns:
      Two float32 arrays [num_prefix + grid**2, K].
    """
    half = head_dim // 2
    exponents = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    frequencies = (np.float32(1) / np.float32(10000.0) ** exponents).astype(np.float32)
    angles = np.repeat(np.arange(grid, dtype=np.float32)[:, None] * frequencies, 2, axis=1)
    rows = np.broadcast_to(angles[:, None], (grid, grid, half))
    columns = np.broadcast_to(angles[None], (grid, grid, half))
    table = np.concatenate([rows, columns], axis=-1).reshape(grid * grid, head_dim)
    table = np.concatenate([np.zeros((num_prefix, head_dim), np.float32), table])
    return np.cos(table), np.sin(table)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the interleaved channel pairs of [B, L, H, K] by tables [L, K], in float32."""
    wide = x.astype(jnp.float32)
    if tuning().swap_by_matmul:
        # Exact: each output is one of the inputs, or its negative.
        swap = jnp.asarray(np.kron(np.eye(x.shape[-1] // 2), [[0, 1], [-1, 0]]), x.dtype)
        precision = "highest" if x.dtype == jnp.float32 else None
        rotated = jnp.matmul(x, swap, precision=precision, preferred_element_type=jnp.float32)
    else:
        pairs = wide.reshape(*x.shape[:-1], -1, 2)
        rotated = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    return wide * cos[:, None] + rotated * sin[:, None]


def centered_rope_tables(
    head_dim: int, rows: int, columns: int, theta: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns cosines and sines of a row-major grid with patch centers in (-1, 1) on each axis.

    Source: transformers modeling_dinov3_vit.py; spec encoder 4 (DINOv3).

    Args:
      head_dim: Channels K of one head, a multiple of 4.
      rows: Patches from top to bottom.
      columns: Patches from left to right.
      theta: Base of the frequencies.

    Returns:
      Two float32 arrays [rows * columns, K] for `rotate_halves`.
    """
    frequencies = theta ** -(np.arange(0, head_dim // 4) * 4 / head_dim)
    sides = [2 * (np.arange(n) + 0.5) / n - 1 for n in (rows, columns)]
    centres = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    angles = (2 * np.pi * centres * frequencies).reshape(len(centres), -1)
    angles = np.tile(angles, 2)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate_halves(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates channel k of [B, L, H, K] with channel k + K/2, by tables of shape [L, K]."""
    first, second = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    return x * cos[:, None] + rotated * sin[:, None]


def sequence_rope_tables(head_dim: int, length: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns cosines and sines of positions 0, 1, ... of a sequence.

    Source: transformers modeling_qwen2.py; spec t2i 2.3.

    Args:
      head_dim: Channels K of one head, a multiple of 2.
      length: Positions L.
      theta: Base of the frequencies.

    Returns:
      Two float32 arrays [L, K] for `rotate_halves`.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1 / np.float32(theta) ** exponents).astype(np.float32)
    angles = np.tile(np.arange(length, dtype=np.float32)[:, None] * frequencies, 2)
    return np.cos(angles), np.sin(angles)
