"""Attention that reads q, k and v out of their fused projection, by Pallas kernels for GPUs.

The projection's raw product goes in: the kernels add its bias and rotate q and k as they load them,
and the backward pass returns the gradient of the raw product. So neither q, k and v nor their
gradients are stored as arrays of their own. The kernels are in `models.triton_kernels`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array
from dsr_jax.models.kernels import ATTENTION_RESIDUALS
from dsr_jax.models.triton_kernels import Sizes, backward_kernel, forward_kernel
from dsr_jax.models.tuning import target_platform
from dsr_jax.parallel.axes import Constrain

_MOST_CHANNELS = 128
_WARPS = 4
"""Of a program: one warp group."""
_STAGES = 2
"""Blocks of keys, or of queries, that are loaded or computed at a time."""


def _per_sample(sizes: Sizes, heads: int) -> pl.BlockSpec:
    """Returns the block of one sample in an array [B, L, heads, K]."""
    block = (None, sizes.padded_length, heads, sizes.padded_channels)
    return pl.BlockSpec(block, lambda i, h, b: (b, 0, 0, 0))


def _specs(sizes: Sizes, bias: Array | None, cos: Array | None) -> list[pl.BlockSpec | None]:
    """Returns the blocks of product, bias, cosines and sines."""
    width = sizes.padded_channels
    table = pl.BlockSpec((sizes.padded_length, width // 2), lambda i, h, b: (0, 0))
    of_bias = pl.BlockSpec((3 * sizes.heads, width), lambda i, h, b: (0, 0))
    return [
        _per_sample(sizes, 3 * sizes.heads),
        None if bias is None else of_bias,
        *((None if cos is None else table,) * 2),
    ]


def _of_log_sums(sizes: Sizes) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, sizes.padded_length), lambda i, h, b: (b, h, 0))


def _merged(x: Array | None) -> Array | None:
    """Merges the axes [3, H] in front of the channels."""
    return None if x is None else x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _call(kernel: Callable[..., None], sizes: Sizes, batch: int, name: str, **specs: Any) -> Any:
    return pl.pallas_call(
        partial(kernel, sizes=sizes),
        grid=(sizes.blocks, sizes.heads, batch),
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        name=name,
        **specs,
    )


def _run_forward(
    qkv: Array, bias: Array | None, cos: Array | None, sin: Array | None, *, interpret: bool
) -> tuple[Array, Array]:
    """Returns the output [B, L, H, K] and log-sums [B, H, L] of the samples on one device."""
    batch, length, _, heads, channels = qkv.shape
    sizes = Sizes(length, heads, channels)
    run = _call(
        forward_kernel,
        sizes,
        batch,
        "triton_attention_forward",
        interpret=interpret,
        in_specs=_specs(sizes, bias, cos),
        out_specs=(_per_sample(sizes, heads), _of_log_sums(sizes)),
        out_shape=(
            jax.ShapeDtypeStruct((batch, length, heads, channels), qkv.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
    )
    return run(_merged(qkv), _merged(bias), cos, sin)


def _run_backward(
    qkv: Array,
    bias: Array | None,
    cos: Array | None,
    sin: Array | None,
    out: Array,
    log_sums: Array,
    grad: Array,
    *,
    interpret: bool,
) -> tuple[Array, Array | None]:
    """Returns gradients of the product, and of the bias by sample and block [B, N, 3, H, K]."""
    batch, length, _, heads, channels = qkv.shape
    sizes = Sizes(length, heads, channels)
    tokens = _per_sample(sizes, heads)
    packed = _per_sample(sizes, 3 * heads)
    sums = (batch, sizes.blocks, 3 * heads, channels)
    block = (None, None, 3 * heads, sizes.padded_channels)
    of_sums = pl.BlockSpec(block, lambda i, h, b: (b, i, 0, 0))
    run = _call(
        backward_kernel,
        sizes,
        batch,
        "triton_attention_backward",
        interpret=interpret,
        in_specs=[*_specs(sizes, bias, cos), tokens, _of_log_sums(sizes), tokens],
        out_specs=(packed, None if bias is None else of_sums),
        out_shape=(
            jax.ShapeDtypeStruct((batch, length, 3 * heads, channels), qkv.dtype),
            None if bias is None else jax.ShapeDtypeStruct(sums, jnp.float32),
        ),
    )
    grad_qkv, grad_bias = run(_merged(qkv), _merged(bias), cos, sin, out, log_sums, grad)
    if grad_bias is not None:
        grad_bias = grad_bias.reshape(*sums[:2], 3, heads, channels)
    return grad_qkv.reshape(qkv.shape), grad_bias


_AXES = {
    "qkv": ("act_batch", None, None, "act_heads", None),
    "bias": (None, "act_heads", None),
    "table": (None, None),
    "tokens": ("act_batch", None, "act_heads", None),
    "log_sums": ("act_batch", "act_heads", None),
}
"""Logical axes of the kernels' arrays."""
_INPUTS = ("qkv", "bias", "table", "table")
_SAVED = ("tokens", "log_sums")


def _on_devices(
    function: Callable[..., tuple[Any, ...]],
    inputs: tuple[str, ...],
    results: tuple[str, ...],
    qkv: Array,
    constrain: Constrain,
) -> Callable[..., tuple[Any, ...]]:
    """Runs `function` on each device's samples and heads: kernels cannot be partitioned.

    `inputs` and `results` name its arrays as in `_AXES`.
    """
    function = partial(function, interpret=target_platform() != "gpu")
    split = ("act_batch", "act_heads")
    batch, heads = constrain.fitted_spec((qkv.shape[0], qkv.shape[3]), split)
    devices = {None: None, "act_batch": batch, "act_heads": heads}

    def specs(names: tuple[str, ...]) -> tuple[PartitionSpec, ...]:
        return tuple(PartitionSpec(*(devices[axis] for axis in _AXES[name])) for name in names)

    return constrain.on_each_device(function, specs(inputs), specs(results))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    qkv: Array,
    bias: Array | None,
    cos: Array | None,
    sin: Array | None,
    constrain: Constrain,
) -> Array:
    return _forward(qkv, bias, cos, sin, constrain)[0]


_Kept = tuple[Array, Array | None, Array | None, Array | None, Array, Array]


def _forward(
    qkv: Array,
    bias: Array | None,
    cos: Array | None,
    sin: Array | None,
    constrain: Constrain,
) -> tuple[Array, _Kept]:
    run = _on_devices(_run_forward, _INPUTS, _SAVED, qkv, constrain)
    out, log_sums = run(qkv, bias, cos, sin)
    out = checkpoint_name(out, ATTENTION_RESIDUALS)
    log_sums = checkpoint_name(log_sums, ATTENTION_RESIDUALS)
    return out, (qkv, bias, cos, sin, out, log_sums)


def _backward(
    constrain: Constrain, kept: _Kept, grad: Array
) -> tuple[Array, Array | None, None, None]:
    qkv, bias = kept[:2]
    # A bias's sums have the axes of the product: samples, blocks of tokens, 3, heads, channels.
    inputs, results = (*_INPUTS, *_SAVED, "tokens"), ("qkv", "qkv")
    grad_qkv, sums = _on_devices(_run_backward, inputs, results, qkv, constrain)(*kept, grad)
    grad_bias = None if bias is None else sums.sum(axis=(0, 1)).astype(bias.dtype)
    return grad_qkv, grad_bias, None, None


_attend.defvjp(_forward, _backward)


def attend_packed(
    qkv: Array,
    bias: Array | None,
    rope: tuple[Array, Array] | None,
    constrain: Constrain = Constrain(),  # noqa: B008
) -> Array:
    """Computes softmax attention of all tokens of a sample to all others.

    Args:
      qkv: Fused projection [B, L, 3, H, K] without its bias; K is at most 128.
      bias: Of the projection [3, H, K]; None for none.
      rope: Cosines and sines [L, K] as of `models.rope.rope_tables`, equal for both channels of a
        pair, for q and k; None for no rotation.
      constrain: Layout of activations over the devices.

    Returns:
      [B, L, H, K] in the dtype of `qkv`.

    Raises:
      ConfigError: If heads have more than 128 channels.
    """
    if qkv.shape[-1] > _MOST_CHANNELS:
        raise ConfigError(
            f"config.model.attention='triton' for heads of {qkv.shape[-1]} channels: its kernels "
            f"hold at most {_MOST_CHANNELS}",
            "use config.model.attention=auto",
        )
    cos = sin = None
    if rope is not None:
        cos, sin = (jnp.asarray(table, jnp.float32)[:, ::2] for table in rope)
    return _attend(qkv, bias, cos, sin, constrain)
