"""Norms with modulation and gated residuals as Pallas Triton kernels, one pass in each direction.

Per sample, modulation and bias are a factor and an offset: norm(x) * multiplier + shift, and
x + gate * y + offset. How these come from scales, shifts and biases is left to JAX, which
differentiates it: the arrays are small. Kernels read and write each array of tokens once, compute
in float32, and keep nothing but their inputs: statistics are computed again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from dsr_jax.core.typing import Array
from dsr_jax.models.triton_rows import (
    Piece,
    both,
    call,
    load,
    make_pieces,
    split_rows,
    store,
)
from dsr_jax.parallel.axes import Constrain

_NAMES = ("act_batch", "act_len", "act_embed")


@dataclass(frozen=True)
class NormKernel:
    """Settings of the kernels.

    Attributes:
      epsilon: Added to the mean square.
      center: Subtracts the mean first, as LayerNorm does and RMSNorm does not.
      dtype: Dtype of a norm's result.
      constrain: Layout of activations over the devices.
    """

    epsilon: float
    center: bool
    dtype: str
    constrain: Constrain = Constrain()


def fits_kernels(shape: tuple[int, ...], constrain: Constrain) -> bool:
    """Whether each device has whole samples of tokens [B, L, D], which the kernels need."""
    return tuple(constrain.fitted_spec(shape, _NAMES))[1:] == (None, None)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def branch_norm(x: Array, multiplier: Array, shift: Array, how: NormKernel) -> tuple[Array, Array]:
    """Returns x and norm(x) * multiplier + shift.

    x is a result, too, for the rest of a block: so the gradients of both uses arrive in one kernel.

    Args:
      x: Residual stream [B, L, D].
      multiplier: [B, D] in float32.
      shift: [B, D] in float32.
      how: Settings.
    """
    return _norm_forward(x, multiplier, shift, how)[0]


def _norm_forward(
    x: Array, multiplier: Array, shift: Array, how: NormKernel
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    (h,) = _run(_norm_kernel, how, (x,), (multiplier, shift), (how.dtype,), 0)
    return (x, h), (x, multiplier)


def _norm_backward(
    how: NormKernel, kept: tuple[Array, Array], grads: tuple[Array, Array]
) -> tuple[Array, ...]:
    x, multiplier = kept
    grad_x, *sums = _run(_norm_back_kernel, how, (x, *grads), (multiplier,), (x.dtype,), 2)
    return grad_x, *_total(sums)


branch_norm.defvjp(_norm_forward, _norm_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def residual(x: Array, y: Array, gate: Array, offset: Array, how: NormKernel) -> Array:
    """Returns x + gate * y + offset in the dtype of x.

    Args:
      x: Residual stream [B, L, D].
      y: Output of a branch [B, L, D].
      gate: [B, D] in float32.
      offset: [B, D] in float32; gate times the bias of the branch's last projection.
      how: Settings.
    """
    return _residual_forward(x, y, gate, offset, how)[0]


def _residual_forward(
    x: Array, y: Array, gate: Array, offset: Array, how: NormKernel
) -> tuple[Array, tuple[Array, Array]]:
    (total,) = _run(_residual_kernel, how, (x, y), (gate, offset), (x.dtype,), 0)
    return total, (y, gate)


def _residual_backward(
    how: NormKernel, kept: tuple[Array, Array], grad: Array
) -> tuple[Array, ...]:
    y, gate = kept
    grad_y, *sums = _run(_residual_back_kernel, how, (grad, y), (gate,), (y.dtype,), 2)
    return grad, grad_y, *_total(sums)


residual.defvjp(_residual_forward, _residual_backward)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def residual_norm(
    x: Array,
    y: Array,
    gate: Array,
    offset: Array,
    multiplier: Array,
    shift: Array,
    how: NormKernel,
) -> tuple[Array, Array]:
    """Returns x' = x + gate * y + offset, and norm(x') * multiplier + shift for the next branch.

    Args as in `residual` and `branch_norm`.
    """
    return _both_forward(x, y, gate, offset, multiplier, shift, how)[0]


_BothKept = tuple[Array, Array, Array, Array]


def _both_forward(
    x: Array,
    y: Array,
    gate: Array,
    offset: Array,
    multiplier: Array,
    shift: Array,
    how: NormKernel,
) -> tuple[tuple[Array, Array], _BothKept]:
    vectors = gate, offset, multiplier, shift
    total, h = _run(_both_kernel, how, (x, y), vectors, (x.dtype, how.dtype), 0)
    return (total, h), (total, y, gate, multiplier)


def _both_backward(
    how: NormKernel, kept: _BothKept, grads: tuple[Array, Array]
) -> tuple[Array, ...]:
    total, y, gate, multiplier = kept
    arrays, dtypes = (total, *grads, y), (total.dtype, y.dtype)
    grad_x, grad_y, *sums = _run(_both_back_kernel, how, arrays, (gate, multiplier), dtypes, 4)
    return grad_x, grad_y, *_total(sums)


residual_norm.defvjp(_both_forward, _both_backward)


def _total(sums: list[Array]) -> tuple[Array, ...]:
    """Adds up the sums [B, programs, D] of each sample."""
    return tuple(part.sum(axis=1) for part in sums)


_Row = list[Array]
"""Pieces [size] of a row in float32."""
_Body = Callable[[NormKernel, int, list[_Row], list[_Row]], tuple[list[_Row], list[_Row]]]
"""Computes a row of each result, and what is added to each sum, from the settings, the width, a row
of each array and the vectors."""


def _run(
    body: _Body,
    how: NormKernel,
    arrays: tuple[Array, ...],
    vectors: tuple[Array, ...],
    dtypes: tuple[Any, ...],
    num_sums: int,
) -> tuple[Array, ...]:
    """Runs a kernel on the rows of arrays.

    Args:
      body: What it computes for a row.
      how: Settings.
      arrays: Of tokens [B, L, D].
      vectors: Of samples [B, D].
      dtypes: Of the results [B, L, D].
      num_sums: Number of sums over the rows of a program [B, programs, D], further results.
    """
    spec = how.constrain.fitted_spec(arrays[0].shape, _NAMES)
    samples = PartitionSpec(spec[0])
    in_specs = (*(spec for _ in arrays), *(samples for _ in vectors))
    out_specs = (*(spec for _ in dtypes), *(samples for _ in range(num_sums)))

    def here(*inputs: Array) -> tuple[Array, ...]:
        return _call(body, how, inputs, len(arrays), dtypes, num_sums)

    return how.constrain.on_each_device(here, in_specs, out_specs)(*arrays, *vectors)


def _call(
    body: _Body,
    how: NormKernel,
    inputs: tuple[Array, ...],
    num_arrays: int,
    dtypes: tuple[Any, ...],
    num_sums: int,
) -> tuple[Array, ...]:
    batch, length, width = inputs[0].shape
    programs, rows = split_rows(length)
    padded = sum(piece.size for piece in make_pieces(width))
    token = pl.BlockSpec((None, rows, padded), lambda b, i: (b, i, 0))
    vector = pl.BlockSpec((None, padded), lambda b, i: (b, 0))
    part = pl.BlockSpec((None, None, padded), lambda b, i: (b, i, 0))
    whole = length == programs * rows
    return call(
        partial(
            _kernel,
            body=body,
            how=how,
            width=width,
            rows=rows,
            length=None if whole else length,
            counts=(num_arrays, len(inputs), len(inputs) + len(dtypes)),
        ),
        body.__name__.strip("_"),
        (batch, programs),
        [token if i < num_arrays else vector for i in range(len(inputs))],
        [*(token for _ in dtypes), *(part for _ in range(num_sums))],
        [
            *(jax.ShapeDtypeStruct(inputs[0].shape, dtype) for dtype in dtypes),
            *(jax.ShapeDtypeStruct((batch, programs, width), jnp.float32) for _ in range(num_sums)),
        ],
        inputs,
    )


def _kernel(
    *refs: Any,
    body: _Body,
    how: NormKernel,
    width: int,
    rows: int,
    length: int | None,
    counts: tuple[int, int, int],
) -> None:
    """Runs `body` on the rows of a program, of which those from `length` on do not exist."""
    arrays, vectors = refs[: counts[0]], refs[counts[0] : counts[1]]
    results, sums = refs[counts[1] : counts[2]], refs[counts[2] :]
    pieces = make_pieces(width)

    def channels(ref: Any, piece: Piece) -> Any:
        return ref.at[pl.ds(piece.start, piece.size)]

    given = [[load(channels(ref, p), p.mask) for p in pieces] for ref in vectors]
    first = pl.program_id(1) * rows

    def step(row: Array, added: list[_Row]) -> list[_Row]:
        exists = None if length is None else first + row < length

        def part(ref: Any, piece: Piece) -> Any:
            return ref.at[row, pl.ds(piece.start, piece.size)]

        read = [[load(part(ref, p), both(exists, p.mask)) for p in pieces] for ref in arrays]
        outputs, addends = body(how, width, read, given)
        for ref, output in zip(results, outputs, strict=True):
            for piece, value in zip(pieces, output, strict=True):
                store(part(ref, piece), value, both(exists, piece.mask))
        return jax.tree.map(jnp.add, added, addends)

    start = [[jnp.zeros(p.size, jnp.float32) for p in pieces] for _ in sums]
    for ref, total in zip(sums, jax.lax.fori_loop(0, rows, step, start), strict=True):
        for piece, value in zip(pieces, total, strict=True):
            store(channels(ref, piece), value, piece.mask)


def _normalize(how: NormKernel, width: int, x: _Row) -> tuple[_Row, Array]:
    """Returns the normalized row and the inverse of its standard deviation."""
    if how.center:
        mean = _sum(x) / width
        masks = [piece.mask for piece in make_pieces(width)]
        x = [
            part - mean if mask is None else jnp.where(mask, part - mean, 0.0)
            for part, mask in zip(x, masks, strict=True)
        ]
    square = _sum(_times(x, x)) / width
    inverse = jax.lax.rsqrt(square + how.epsilon)
    return [part * inverse for part in x], inverse


def _sum(row: _Row) -> Array:
    return sum((jnp.sum(part) for part in row[1:]), jnp.sum(row[0]))


def _times(a: _Row, b: _Row) -> _Row:
    return jax.tree.map(jnp.multiply, a, b)


def _plus(a: _Row, b: _Row) -> _Row:
    return jax.tree.map(jnp.add, a, b)


def _norm_kernel(
    how: NormKernel, width: int, read: list[_Row], given: list[_Row]
) -> tuple[list[_Row], list[_Row]]:
    (x,), (multiplier, shift) = read, given
    return [_plus(_times(_normalize(how, width, x)[0], multiplier), shift)], []


def _norm_back_kernel(
    how: NormKernel, width: int, read: list[_Row], given: list[_Row]
) -> tuple[list[_Row], list[_Row]]:
    """Returns the gradient of x, and what is added to those of multiplier and shift."""
    (x, grad_x, grad), (multiplier,) = read, given
    normed, inverse = _normalize(how, width, x)
    wide = _times(grad, multiplier)
    along = _sum(_times(wide, normed)) / width
    mean = _sum(wide) / width if how.center else 0.0
    through = [(g - mean - n * along) * inverse for g, n in zip(wide, normed, strict=True)]
    return [_plus(grad_x, through)], [_times(grad, normed), grad]


def _residual_kernel(
    how: NormKernel, width: int, read: list[_Row], given: list[_Row]
) -> tuple[list[_Row], list[_Row]]:
    (x, y), (gate, offset) = read, given
    return [_plus(_plus(x, offset), _times(gate, y))], []


def _residual_back_kernel(
    how: NormKernel, width: int, read: list[_Row], given: list[_Row]
) -> tuple[list[_Row], list[_Row]]:
    """Returns the gradient of y, and what is added to those of gate and offset."""
    (grad, y), (gate,) = read, given
    return [_times(gate, grad)], [_times(grad, y), grad]


def _both_kernel(
    how: NormKernel, width: int, read: list[_Row], given: list[_Row]
) -> tuple[list[_Row], list[_Row]]:
    (total,), _ = _residual_kernel(how, width, read, given[:2])
    (h,), _ = _norm_kernel(how, width, [total], given[2:])
    return [total, h], []


def _both_back_kernel(
    how: NormKernel, width: int, read: list[_Row], given: list[_Row]
) -> tuple[list[_Row], list[_Row]]:
    (total, grad_total, grad, y), (gate, multiplier) = read, given
    (grad_x,), sums = _norm_back_kernel(how, width, [total, grad_total, grad], [multiplier])
    (grad_y,), more = _residual_back_kernel(how, width, [grad_x, y], [gate])
    return [grad_x, grad_y], [*more, *sums]
