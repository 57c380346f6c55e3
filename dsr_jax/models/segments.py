"""Segment numbers for attention to packed sequences and padding, for every kernel."""

from typing import NamedTuple

import jax.numpy as jnp

from dsr_jax.core.typing import Array


class Segments(NamedTuple):
    """Positions of one sample attend to those with the same number, and to no others.

    Padding is a segment of its own. A query without any key returns a finite mean of values. The
    largest int32 is reserved for `pad_lengths`.

    Attributes:
      q: Numbers of the queries, int32 [B, L].
      kv: Numbers of the keys, int32 [B, M].
    """

    q: Array
    kv: Array

    @property
    def mask(self) -> Array:
        """Whether a query may attend to a key, bool [B, 1, L, M]."""
        return (self.q[:, :, None] == self.kv[:, None, :])[:, None]


def pad_lengths(
    q: Array, k: Array, v: Array, segments: Segments | None, multiple: int
) -> tuple[Array, Array, Array, Segments | None]:
    """Pads queries [B, L, H, K] and keys and values [B, M, H, K] to multiples of a length.

    If keys are padded, the returned segments exclude the padding from attention.
    """
    rows, columns = -q.shape[1] % multiple, -k.shape[1] % multiple
    if columns and segments is None:
        segments = Segments(*(jnp.zeros(x.shape[:2], jnp.int32) for x in (q, k)))
    if segments is not None:
        padding = jnp.iinfo(jnp.int32).max
        segments = Segments(
            jnp.pad(segments.q, ((0, 0), (0, rows)), constant_values=padding),
            jnp.pad(segments.kv, ((0, 0), (0, columns)), constant_values=padding),
        )

    def pad(x: Array, extra: int) -> Array:
        return jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0)))

    return pad(q, rows), pad(k, columns), pad(v, columns), segments
