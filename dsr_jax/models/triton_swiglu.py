"""SwiGLU as a Pallas Triton kernel that adds its first layer's bias, one pass in each direction.

The gradient of that layer's result is one array, and that of the bias is summed as it is written.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from dsr_jax.core.typing import Array
from dsr_jax.models.triton_rows import (
    both,
    call,
    load,
    split_rows,
    store,
)
from dsr_jax.parallel.axes import Constrain

_NAMES = ("act_batch", "act_len", None, "act_mlp")
_UNITS = 1024
"""Most hidden units of a program."""


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def swiglu(raw: Array, bias: Array, constrain: Constrain) -> Array:
    """Returns silu(gate + gate's bias) * (value + value's bias) in the dtype of `raw`.

    Args:
      raw: Gate and value before their bias is added [B, L, 2, M].
      bias: [2, M].
      constrain: Layout of activations over the devices.

    Returns:
      [B, L, M].
    """
    return _forward(raw, bias, constrain)[0]


def _forward(raw: Array, bias: Array, constrain: Constrain) -> tuple[Array, tuple[Array, Array]]:
    *inputs, hidden_spec = _specs(raw, constrain)
    run = constrain.on_each_device(_run_forward, tuple(inputs), (hidden_spec,))
    (hidden,) = run(raw, bias)
    return hidden, (raw, bias)


def _backward(constrain: Constrain, kept: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    raw, bias = kept
    specs = _specs(raw, constrain)
    spec = specs[0]
    # Programs of all devices, whose sums XLA adds up.
    programs = PartitionSpec(spec[0], spec[1], None, None, spec[3])
    run = constrain.on_each_device(_run_backward, specs, (spec, programs))
    grad_raw, sums = run(raw, bias, grad)
    return grad_raw, sums.sum(axis=(0, 1, 2)).astype(bias.dtype)


swiglu.defvjp(_forward, _backward)


def _specs(raw: Array, constrain: Constrain) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
    """Returns how the product, the bias and the hidden units are split over the devices."""
    spec = constrain.fitted_spec(raw.shape, _NAMES)
    return spec, PartitionSpec(None, spec[3]), PartitionSpec(spec[0], spec[1], spec[3])


def _blocks(raw: Array) -> tuple[tuple[int, int], int, dict[str, pl.BlockSpec]]:
    """Returns the grid, the rows of a program, and the blocks of arrays, for raw [N, 2, M]."""
    length, _, width = raw.shape
    units = min(_UNITS, 1 << (width - 1).bit_length())
    programs, rows = split_rows(length)
    blocks = {
        "raw": pl.BlockSpec((rows, 2, units), lambda i, j: (i, 0, j)),
        "bias": pl.BlockSpec((2, units), lambda i, j: (0, j)),
        "hidden": pl.BlockSpec((rows, units), lambda i, j: (i, j)),
        "sums": pl.BlockSpec((None, 2, units), lambda i, j: (i, 0, j)),
    }
    return (programs, math.ceil(width / units)), rows, blocks


def _run_forward(raw: Array, bias: Array) -> tuple[Array, ...]:
    flat = raw.reshape(-1, *raw.shape[2:])
    grid, rows, blocks = _blocks(flat)
    (hidden,) = call(
        partial(_forward_kernel, shape=(flat.shape[0], flat.shape[2]), rows=rows),
        "swiglu",
        grid,
        [blocks["raw"], blocks["bias"]],
        [blocks["hidden"]],
        [jax.ShapeDtypeStruct((flat.shape[0], flat.shape[2]), raw.dtype)],
        (flat, bias),
    )
    return (hidden.reshape(*raw.shape[:2], raw.shape[3]),)


def _run_backward(raw: Array, bias: Array, grad: Array) -> tuple[Array, ...]:
    flat = raw.reshape(-1, *raw.shape[2:])
    grid, rows, blocks = _blocks(flat)
    grad_raw, sums = call(
        partial(_backward_kernel, shape=(flat.shape[0], flat.shape[2]), rows=rows),
        "swiglu_back",
        grid,
        [blocks["raw"], blocks["bias"], blocks["hidden"]],
        [blocks["raw"], blocks["sums"]],
        [
            jax.ShapeDtypeStruct(flat.shape, raw.dtype),
            jax.ShapeDtypeStruct((grid[0], *bias.shape), jnp.float32),
        ],
        (flat, bias, grad.reshape(-1, grad.shape[2])),
    )
    return grad_raw.reshape(raw.shape), sums[None, None]


def _masks(shape: tuple[int, int], rows: int, units: int) -> tuple[Array | None, Any]:
    """Returns which hidden units of a program exist, and a function that says so of a row."""
    length, width = shape
    first = pl.program_id(0) * rows
    exist = None
    if width % units:
        exist = pl.program_id(1) * units + jnp.arange(units) < width
    return exist, lambda row: None if length % rows == 0 else first + row < length


def _forward_kernel(raw: Any, bias: Any, hidden: Any, *, shape: tuple[int, int], rows: int) -> None:
    units = hidden.shape[1]
    exist, row_exists = _masks(shape, rows, units)
    all_units = pl.ds(0, units)
    biases = [load(bias.at[np.int32(i), all_units], exist) for i in range(2)]

    def step(row: Array, _: None) -> None:
        mask = both(row_exists(row), exist)
        gate, value = (
            load(raw.at[row, np.int32(i), all_units], mask) + biases[i] for i in range(2)
        )
        store(hidden.at[row, all_units], gate * jax.nn.sigmoid(gate) * value, mask)

    jax.lax.fori_loop(0, rows, step, None)


def _backward_kernel(
    raw: Any,
    bias: Any,
    grad: Any,
    grad_raw: Any,
    sums: Any,
    *,
    shape: tuple[int, int],
    rows: int,
) -> None:
    units = grad.shape[1]
    exist, row_exists = _masks(shape, rows, units)
    all_units = pl.ds(0, units)
    biases = [load(bias.at[np.int32(i), all_units], exist) for i in range(2)]

    def step(row: Array, added: list[Array]) -> list[Array]:
        mask = both(row_exists(row), exist)
        gate, value = (
            load(raw.at[row, np.int32(i), all_units], mask) + biases[i] for i in range(2)
        )
        upstream = load(grad.at[row, all_units], mask)
        sigmoid = jax.nn.sigmoid(gate)
        slope = sigmoid * (1 + gate * (1 - sigmoid))
        grads = [upstream * value * slope, upstream * gate * sigmoid]
        for i, part in enumerate(grads):
            store(grad_raw.at[row, np.int32(i), all_units], part, mask)
        return [total + part for total, part in zip(added, grads, strict=True)]

    start = [jnp.zeros(units, jnp.float32)] * 2
    for i, total in enumerate(jax.lax.fori_loop(0, rows, step, start)):
        store(sums.at[np.int32(i), all_units], total, exist)
