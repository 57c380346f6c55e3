"""Element-wise parts of a block, each with a backward pass that computes again in place of keeping.

Differentiated by JAX, a norm with modulation, a gated residual and SwiGLU keep several arrays as
large as their inputs, and read and write them again in the backward pass. On a GPU such traffic
took as long as all matmuls. These keep their inputs alone, and compute in float32 whatever the
dtype of inputs and outputs.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from dsr_jax.core.typing import Array
from dsr_jax.models.tuning import tuning
from dsr_jax.parallel.axes import Constrain


def _sum_to(x: Array, like: Array) -> Array:
    """Sums x over the dimensions along which `like` was broadcast; returns its shape."""
    front = tuple(range(x.ndim - like.ndim))
    inner = tuple(
        x.ndim - like.ndim + i
        for i, n in enumerate(like.shape)
        if n == 1 and x.shape[i - like.ndim] != 1
    )
    return x.sum(axis=front + inner).reshape(like.shape)


def _row_major(x: Array, constrain: Constrain | None) -> Array:
    """Asks the compiler to store tokens [B, L, D] in the order of their dimensions, where it pays.

    The compiler cannot partition the request, and would gather the whole batch for it: so each
    device makes it for its own samples.
    """
    if not tuning().row_major:
        return x

    def store(x: Array) -> Array:
        return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))

    if constrain is None:
        return store(x)
    spec = constrain.fitted_spec(x.shape, ("act_batch", "act_len", "act_embed"))
    return constrain.on_each_device(store, spec, spec)(x)


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def scaled_norm(
    x: Array,
    scale: Array | None,
    factor: Array | None,
    offset: Array | None,
    epsilon: float,
    center: bool,
    dtype: str,
) -> Array:
    """Normalizes the last dimension, then scales and shifts: one pass, with float32 statistics.

    Args:
      x: [..., D].
      scale: Multiplies [D]; None for 1.
      factor: Of the modulation, which multiplies by 1 + factor; broadcasts to x. None for 0.
      offset: Broadcasts to x; None for 0.
      epsilon: Added to the mean square.
      center: Subtracts the mean first, as LayerNorm does and RMSNorm does not.
      dtype: Dtype of the result.

    Returns:
      [..., D].
    """
    return _norm_forward(x, scale, factor, offset, epsilon, center, dtype)[0]


_NormKept = tuple[Array, Array | None, Array | None, Array | None, Array | None, Array]


def _multiplier(scale: Array | None, factor: Array | None) -> Array | float:
    """Returns scale * (1 + factor) in float32."""
    wide: Array | float = 1.0 if factor is None else 1 + _wide(factor)
    return wide if scale is None else wide * _wide(scale)


def _norm_forward(
    x: Array,
    scale: Array | None,
    factor: Array | None,
    offset: Array | None,
    epsilon: float,
    center: bool,
    dtype: str,
) -> tuple[Array, _NormKept]:
    wide = _wide(x)
    mean = jnp.mean(wide, axis=-1, keepdims=True) if center else None
    wide = wide if mean is None else wide - mean
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    y = wide * inverse * _multiplier(scale, factor)
    if offset is not None:
        y = y + _wide(offset)
    # The multiplier, per token as large as x in float32, is computed again in the backward pass.
    return y.astype(dtype), (x, scale, factor, offset, mean, inverse)


def _norm_backward(
    epsilon: float, center: bool, dtype: str, kept: _NormKept, grad: Array
) -> tuple[Array, Array | None, Array | None, Array | None]:
    del epsilon, dtype
    x, scale, factor, offset, mean, inverse = kept
    grad, wide = _wide(grad), _wide(x)
    normed = (wide if mean is None else wide - mean) * inverse
    grad_offset = None if offset is None else _sum_to(grad, offset).astype(offset.dtype)
    grad_scale, grad_factor = _multiplier_backward(grad * normed, scale, factor)
    grad = grad * _multiplier(scale, factor)
    along = normed * jnp.mean(grad * normed, axis=-1, keepdims=True)
    if center:
        along = along + jnp.mean(grad, axis=-1, keepdims=True)
    grad_x = (inverse * (grad - along)).astype(x.dtype)
    return grad_x, grad_scale, grad_factor, grad_offset


def _multiplier_backward(
    grad: Array, scale: Array | None, factor: Array | None
) -> tuple[Array | None, Array | None]:
    """Returns the gradients of scale and factor from that of their broadcast product."""
    grad_factor: Array | None = None
    if factor is not None:
        grad = _sum_to(grad, factor)
        grad_factor = (grad if scale is None else grad * _wide(scale)).astype(factor.dtype)
        grad = grad * (1 + _wide(factor))
    grad_scale = None if scale is None else _sum_to(grad, scale).astype(scale.dtype)
    return grad_scale, grad_factor


scaled_norm.defvjp(_norm_forward, _norm_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def gated_residual(x: Array, gate: Array, y: Array, constrain: Constrain | None = None) -> Array:
    """Returns x + gate * y in the dtype of x.

    Args:
      x: Residual stream [B, L, D].
      gate: Broadcasts to x.
      y: Output of a branch [B, L, D].
      constrain: Layout of activations over the devices; None where there is one.
    """
    return _gated_forward(x, gate, y, constrain)[0]


def _gated_forward(
    x: Array, gate: Array, y: Array, constrain: Constrain | None
) -> tuple[Array, tuple[Array, Array]]:
    total = (_wide(x) + _wide(gate) * _wide(y)).astype(x.dtype)
    return _row_major(total, constrain), (gate, y)


def _gated_backward(
    constrain: Constrain | None, kept: tuple[Array, Array], grad: Array
) -> tuple[Array, Array, Array]:
    gate, y = kept
    grad = _row_major(grad, constrain)
    wide = _wide(grad)
    grad_gate = _sum_to(wide * _wide(y), gate).astype(gate.dtype)
    return grad, grad_gate, (wide * _wide(gate)).astype(y.dtype)


gated_residual.defvjp(_gated_forward, _gated_backward)


@jax.custom_vjp
def silu_product(gate: Array, value: Array) -> Array:
    """Returns silu(gate) * value of two arrays [..., M], in their dtype."""
    return _silu_forward(gate, value)[0]


def _silu_forward(gate: Array, value: Array) -> tuple[Array, tuple[Array, Array]]:
    return (jax.nn.silu(_wide(gate)) * _wide(value)).astype(gate.dtype), (gate, value)


def _silu_backward(kept: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    gate, value = kept
    wide, upstream = _wide(gate), _wide(grad)
    sigmoid = jax.nn.sigmoid(wide)
    slope = sigmoid * (1 + wide * (1 - sigmoid))
    grad_gate = (upstream * _wide(value) * slope).astype(gate.dtype)
    return grad_gate, (upstream * wide * sigmoid).astype(value.dtype)


silu_product.defvjp(_silu_forward, _silu_backward)
