"""What Pallas Triton kernels on rows of tokens share: pieces of channels, masks, sums.

One program owns some consecutive rows of one sample, and goes through them one after the other.
What the backward pass sums over tokens stays in its registers meanwhile, and is written once: one
float32 partial sum for each program, which XLA adds up.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dsr_jax.core.typing import Array
from dsr_jax.models.tuning import target_platform

MOST_ROWS = 128
"""Most rows of a program: few partial sums, and as many programs as fill a GPU."""
WARPS = 4
_SMALLEST = 128
"""Channels that are one masked piece in place of several small ones."""


@dataclass(frozen=True)
class Piece:
    """Consecutive channels, as many as a power of two, which arrays inside a kernel must have.

    Attributes:
      start: The first.
      size: Their number.
      valid: Number of those that exist.
    """

    start: int
    size: int
    valid: int

    @property
    def mask(self) -> Array | None:
        """Which channels exist [size]; None for all."""
        return None if self.valid == self.size else jnp.arange(self.size) < self.valid


def make_pieces(width: int) -> tuple[Piece, ...]:
    """Splits channels: 1152 are 1024 and 128, where the next power of two is 2048."""
    pieces: list[Piece] = []
    start = 0
    while start < width:
        left = width - start
        size = 1 << (left - 1).bit_length() if left <= _SMALLEST else 1 << left.bit_length() - 1
        pieces.append(Piece(start, size, min(left, size)))
        start += size
    return tuple(pieces)


def split_rows(length: int) -> tuple[int, int]:
    """Returns the number of programs for rows, at most MOST_ROWS each, and the rows of each."""
    rows = math.ceil(length / math.ceil(length / MOST_ROWS))
    return math.ceil(length / rows), rows


def both(a: Array | None, b: Array | None) -> Array | None:
    """Combines two masks, of which None is True everywhere."""
    return a if b is None else b if a is None else a & b


def load(ref: Any, mask: Array | None) -> Array:
    """Loads a part of a reference as float32; 0 where the mask is False."""
    other = None if mask is None else 0.0
    return triton.load(ref, mask=mask, other=other).astype(jnp.float32)


def store(ref: Any, value: Array, mask: Array | None) -> None:
    """Stores float32 values in the reference's dtype."""
    triton.store(ref, value.astype(ref.dtype), mask=mask)


def call(
    kernel: Callable[..., None],
    name: str,
    grid: Sequence[int],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Sequence[pl.BlockSpec],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    inputs: Sequence[Array],
) -> tuple[Array, ...]:
    """Runs a kernel; interpreted where the program is not for GPUs."""
    return tuple(
        pl.pallas_call(
            kernel,
            grid=tuple(grid),
            in_specs=list(in_specs),
            out_specs=list(out_specs),
            out_shape=list(out_shape),
            compiler_params=triton.CompilerParams(num_warps=WARPS),
            interpret=target_platform() != "gpu",
            name=name,
        )(*inputs)
    )
