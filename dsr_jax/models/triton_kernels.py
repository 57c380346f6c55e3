"""What one program of `models.triton_attention` does on a GPU: a block of one head's tokens.

As flash attention: float32 scores and sums of one block of keys at a time, and the backward pass
computes the weights again from one log-sum per query. Block sizes were chosen by the registers of a
thread and the shared memory that ptxas counts for heads of 72 channels on Hopper: 190 and 36 KB in
the forward pass, 255 and 51 KB in the backward pass, which spills 160 bytes of a thread's.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dsr_jax.core.typing import Array

_ROWS = 64
"""Tokens of a program: a warp group's matmul has 64 rows on Hopper."""
_STEP = 32
"""Tokens of the other side that are loaded at a time."""
_LEAST = 16
"""Smallest side of a Triton matmul."""
_FORBIDDEN = -1e30
"""Score of a key behind the end: finite, as its difference to itself is 0."""
_NO_WEIGHT = 1e30
"""Log-sum of a query behind the end, which gives it no weight."""

Tiles = tuple[Array, ...]
"""Channels of a head in tiles [rows, width], one for each of `tiles`."""
Ref = Any


def tiles(channels: int, start: int = 0) -> tuple[tuple[int, int], ...]:
    """Returns (first channel, width) of tiles that cover a head, of widths that Triton has.

    Widths are powers of two: 72 channels are tiles of 64 and 16, not one of 128.
    """
    whole = max(_LEAST, pl.next_power_of_2(channels))
    half = whole // 2
    if half < _LEAST or channels <= half:
        return ((start, whole),)
    rest = tiles(channels - half, start + half)
    return ((start, half), *rest) if sum(width for _, width in rest) < half else ((start, whole),)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a call: tokens L, heads H, channels K of a head."""

    length: int
    heads: int
    channels: int

    @property
    def tiles(self) -> tuple[tuple[int, int], ...]:
        """First channel and width of each tile."""
        return tiles(self.channels)

    @property
    def padded_channels(self) -> int:
        """Channels with padding."""
        return sum(width for _, width in self.tiles)

    @property
    def blocks(self) -> int:
        """Programs for one head of a sample."""
        return math.ceil(self.length / _ROWS)

    @property
    def padded_length(self) -> int:
        """Tokens with padding, which no kernel stores."""
        return self.blocks * _ROWS

    @property
    def log2_scale(self) -> float:
        """Factor on scores whose exponentials have base 2."""
        return math.log2(math.e) * self.channels**-0.5


def _load(ref: Ref, sizes: Sizes, start: Array, count: int, head: Array) -> Tiles:
    """Loads rows of one head of ref [L, heads, K], zeros behind the end."""
    inside = (start + jnp.arange(count) < sizes.length)[:, None]
    found = []
    for first, width in sizes.tiles:
        mask = inside & (first + jnp.arange(width) < sizes.channels)[None]
        place = (pl.ds(start, count), head, pl.ds(first, width))
        found.append(triton.load(ref.at[place], mask=mask, other=0.0))
    return tuple(found)


def _store(ref: Ref, sizes: Sizes, start: Array, head: Array, values: Tiles) -> None:
    """Stores rows of one head of ref [L, heads, K]."""
    inside = (start + jnp.arange(values[0].shape[0]) < sizes.length)[:, None]
    for (first, width), value in zip(sizes.tiles, values, strict=True):
        mask = inside & (first + jnp.arange(width) < sizes.channels)[None]
        place = (pl.ds(start, value.shape[0]), head, pl.ds(first, width))
        triton.store(ref.at[place], value.astype(ref.dtype), mask=mask)


def _rotate(
    values: Tiles, rope: tuple[Ref, Ref] | None, sizes: Sizes, start: Array, sign: int = 1
) -> Tiles:
    """Rotates the interleaved pairs of float32 rows; backward with a sign of -1."""
    if rope is None:
        return values
    rotated = []
    for (first, width), value in zip(sizes.tiles, values, strict=True):
        count, pairs = value.shape[0], width // 2
        inside = (start + jnp.arange(count) < sizes.length)[:, None]
        mask = inside & (first // 2 + jnp.arange(pairs) < sizes.channels // 2)[None]
        place = (pl.ds(start, count), pl.ds(first // 2, pairs))
        cos, sin = (triton.load(table.at[place], mask=mask, other=0.0) for table in rope)
        even, odd = jnp.unstack(value.reshape(count, pairs, 2), axis=-1)
        turned = (even * cos - sign * odd * sin, odd * cos + sign * even * sin)
        rotated.append(jnp.stack(turned, axis=-1).reshape(count, width))
    return tuple(rotated)


class _Inputs:
    """References to the arrays that every kernel reads."""

    def __init__(self, sizes: Sizes, qkv: Ref, bias: Ref, cos: Ref, sin: Ref) -> None:
        self.sizes, self.qkv, self.bias = sizes, qkv, bias
        self.rope = None if cos is None else (cos, sin)
        # Interpreted, a kernel cannot index by numbers that are known when it is traced.
        self.heads = [pl.program_id(1) + i * sizes.heads for i in range(3)]

    def load(self, which: int, start: Array, count: int) -> Tiles:
        """Returns rows of q, k or v (0, 1, 2), with bias and rotated, in the product's dtype."""
        raw = _load(self.qkv, self.sizes, start, count, self.heads[which])
        values = tuple(x.astype(jnp.float32) for x in raw)
        if self.bias is not None:
            values = tuple(
                x + self._bias(which, tile)[None]
                for x, tile in zip(values, self.sizes.tiles, strict=True)
            )
        if which < 2:
            values = _rotate(values, self.rope, self.sizes, start)
        return tuple(x.astype(raw[0].dtype) for x in values)

    def _bias(self, which: int, tile: tuple[int, int]) -> Array:
        mask = tile[0] + jnp.arange(tile[1]) < self.sizes.channels
        loaded = triton.load(self.bias.at[self.heads[which], pl.ds(*tile)], mask=mask, other=0.0)
        return loaded.astype(jnp.float32)


def _product(a: Tiles, b: Tiles) -> Array:
    """Returns a @ b^T in float32, contracted over all tiles' channels."""
    dimensions = (((1,), (1,)), ((), ()))
    parts = [
        lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)
        for x, y in zip(a, b, strict=True)
    ]
    return sum(parts[1:], parts[0])


def _mix(weights: Array, values: Tiles, totals: Tiles) -> Tiles:
    """Returns totals + weights @ values, with weights in the dtype of the values."""
    weights = weights.astype(values[0].dtype)
    return tuple(
        total + jnp.dot(weights, x, preferred_element_type=jnp.float32)
        for total, x in zip(totals, values, strict=True)
    )


def _zeros(sizes: Sizes) -> Tiles:
    return tuple(jnp.zeros((_ROWS, width), jnp.float32) for _, width in sizes.tiles)


def forward_kernel(
    qkv: Ref, bias: Ref, cos: Ref, sin: Ref, out: Ref, log_sums: Ref, *, sizes: Sizes
) -> None:
    """Writes the output and log-sums, of base 2, of one block of queries of one head."""
    inputs = _Inputs(sizes, qkv, bias, cos, sin)
    start = pl.program_id(0) * _ROWS
    q = inputs.load(0, start, _ROWS)

    def step(index: Array, state: tuple[Array, Array, Tiles]) -> tuple[Array, Array, Tiles]:
        peak, total, mixed = state
        first = index * _STEP
        k = inputs.load(1, first, _STEP)
        inside = first + jnp.arange(_STEP) < sizes.length
        scores = jnp.where(inside[None], _product(q, k) * sizes.log2_scale, _FORBIDDEN)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
        shrink = jnp.exp2(peak - new_peak)
        weights = jnp.exp2(scores - new_peak[:, None])
        total = total * shrink + jnp.sum(weights, axis=1)
        mixed = tuple(x * shrink[:, None] for x in mixed)
        return new_peak, total, _mix(weights, inputs.load(2, first, _STEP), mixed)

    state = (jnp.full(_ROWS, _FORBIDDEN), jnp.zeros(_ROWS), _zeros(sizes))
    peak, total, mixed = lax.fori_loop(0, math.ceil(sizes.length / _STEP), step, state)
    _store(out, sizes, start, inputs.heads[0], tuple(x / total[:, None] for x in mixed))
    inside = start + jnp.arange(_ROWS) < sizes.length
    triton.store(log_sums.at[pl.ds(start, _ROWS)], peak + jnp.log2(total), mask=inside)


class _Saved:
    """References to what the forward pass saved, and to the gradient of its output."""

    def __init__(self, sizes: Sizes, out: Ref, log_sums: Ref, grad: Ref) -> None:
        self.sizes, self.out, self.log_sums, self.grad = sizes, out, log_sums, grad
        self.head = pl.program_id(1)

    def load(self, start: Array, count: int) -> tuple[Tiles, Array, Array]:
        """Returns the output's gradient, its product with the output, and log-sums of rows."""
        grad = _load(self.grad, self.sizes, start, count, self.head)
        out = _load(self.out, self.sizes, start, count, self.head)
        products = [
            jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32), axis=1)
            for x, y in zip(out, grad, strict=True)
        ]
        inside = start + jnp.arange(count) < self.sizes.length
        place = self.log_sums.at[pl.ds(start, count)]
        log_sums = triton.load(place, mask=inside, other=_NO_WEIGHT)
        return grad, sum(products[1:], products[0]), log_sums


def _query_gradient(inputs: _Inputs, saved: _Saved, start: Array) -> Tiles:
    """Returns the gradient of one block of rotated queries."""
    sizes = inputs.sizes
    q = inputs.load(0, start, _ROWS)
    grad, along, log_sums = saved.load(start, _ROWS)

    def step(index: Array, grad_q: Tiles) -> Tiles:
        first = index * _STEP
        k = inputs.load(1, first, _STEP)
        inside = first + jnp.arange(_STEP) < sizes.length
        scores = _product(q, k) * sizes.log2_scale - log_sums[:, None]
        weights = jnp.exp2(jnp.where(inside[None], scores, _FORBIDDEN))
        grad_weights = _product(grad, inputs.load(2, first, _STEP))
        return _mix(weights * (grad_weights - along[:, None]), k, grad_q)

    steps = math.ceil(sizes.length / _STEP)
    grad_q = lax.fori_loop(0, steps, step, _zeros(sizes))
    return tuple(x * sizes.channels**-0.5 for x in grad_q)


def _key_gradients(inputs: _Inputs, saved: _Saved, start: Array) -> tuple[Tiles, Tiles]:
    """Returns the gradients of one block of rotated keys, and of values.

    Scores are transposed here, [keys, queries], so that all matmuls have the block's 64 rows.
    """
    sizes = inputs.sizes
    k, v = inputs.load(1, start, _ROWS), inputs.load(2, start, _ROWS)
    inside = (start + jnp.arange(_ROWS) < sizes.length)[:, None]

    def step(index: Array, state: tuple[Tiles, Tiles]) -> tuple[Tiles, Tiles]:
        grad_k, grad_v = state
        first = index * _STEP
        q = inputs.load(0, first, _STEP)
        grad, along, log_sums = saved.load(first, _STEP)
        scores = _product(k, q) * sizes.log2_scale - log_sums[None]
        weights = jnp.exp2(jnp.where(inside, scores, _FORBIDDEN))
        grad_v = _mix(weights, grad, grad_v)
        return _mix(weights * (_product(v, grad) - along[None]), q, grad_k), grad_v

    steps = math.ceil(sizes.length / _STEP)
    grad_k, grad_v = lax.fori_loop(0, steps, step, (_zeros(sizes), _zeros(sizes)))
    return tuple(x * sizes.channels**-0.5 for x in grad_k), grad_v


def backward_kernel(
    qkv: Ref,
    bias: Ref,
    cos: Ref,
    sin: Ref,
    out: Ref,
    log_sums: Ref,
    grad: Ref,
    grad_qkv: Ref,
    grad_bias: Ref,
    *,
    sizes: Sizes,
) -> None:
    """Writes one block's gradient of the raw product, and its sum over the block's tokens."""
    inputs, saved = _Inputs(sizes, qkv, bias, cos, sin), _Saved(sizes, out, log_sums, grad)
    start = pl.program_id(0) * _ROWS

    def finish(which: int, gradient: Tiles) -> None:
        if which < 2:
            gradient = _rotate(gradient, inputs.rope, sizes, start, sign=-1)
        _store(grad_qkv, sizes, start, inputs.heads[which], gradient)
        if bias is None:
            return
        inside = (start + jnp.arange(_ROWS) < sizes.length)[:, None]
        for (first, width), value in zip(sizes.tiles, gradient, strict=True):
            total = jnp.sum(jnp.where(inside, value, 0.0), axis=0)
            mask = first + jnp.arange(width) < sizes.channels
            triton.store(grad_bias.at[inputs.heads[which], pl.ds(first, width)], total, mask=mask)

    finish(0, _query_gradient(inputs, saved, start))
    grad_k, grad_v = _key_gradients(inputs, saved, start)
    finish(1, grad_k)
    finish(2, grad_v)
