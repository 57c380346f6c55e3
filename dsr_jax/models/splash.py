"""Attention by JAX's splash kernel for TPUs, which keeps scores out of main memory."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from dsr_jax.core.typing import Array
from dsr_jax.models.segments import Segments, pad_lengths

_LANES = 128
_BLOCKS = (512, 384, 256, 128)


def attend_splash(
    q: Array,
    k: Array,
    v: Array,
    segments: Segments | None,
    *,
    residuals: str,
    causal: bool = False,
    interpret: bool = False,
) -> Array:
    """Computes softmax attention of the samples and heads on one device.

    Lengths are padded to multiples of the kernel's blocks; padding is masked out.

    Args:
      q: Queries [B, L, H, K], scaled by 1/sqrt(K) inside.
      k: Keys [B, M, H, K].
      v: Values [B, M, H, K].
      segments: Segments of positions that attend to each other; None for all to all.
      residuals: Checkpoint name of the residuals that rematerialization may keep.
      causal: A query attends to no key behind its own position.
      interpret: Interprets the kernel, for platforms other than TPUs.

    Returns:
      [B, L, H, K] in the dtype of `q`.
    """
    length, heads = q.shape[1], q.shape[2]
    q, k, v, segments = pad_lengths(q * q.shape[-1] ** -0.5, k, v, segments, _LANES)
    block_q, block_kv = (
        next(block for block in _BLOCKS if x.shape[1] % block == 0) for x in (q, k)
    )
    kind = masks.CausalMask if causal else masks.FullMask
    mask = kind((q.shape[1], k.shape[1]))
    kernel = kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads),
        # One kernel for all gradients computes the weights once. With several blocks of keys it
        # writes a partial gradient of the queries for each.
        block_sizes=kernels.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            use_fused_bwd_kernel=True,
        ),
        residual_checkpoint_name=residuals,
        interpret=interpret,
    )
    numbers = None if segments is None else kernels.SegmentIds(*segments)
    heads_first = (x.swapaxes(1, 2) for x in (q, k, v))
    out = _with_precision(jax.vmap(kernel), *heads_first, numbers)
    return out.swapaxes(1, 2)[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_precision(
    kernel: Callable[..., Array], q: Array, k: Array, v: Array, numbers: kernels.SegmentIds | None
) -> Array:
    """Calls the kernel, forward and backward, under a matmul precision that Mosaic supports.

    It supports "default" and "highest", but not "high", which a run may have as its default.
    """
    with _supported_precision(q.dtype):
        return kernel(q, k, v, numbers)


def _supported_precision(dtype: jnp.dtype) -> AbstractContextManager[None]:
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")


def _forward(
    kernel: Callable[..., Array], q: Array, k: Array, v: Array, numbers: kernels.SegmentIds | None
) -> tuple[Array, Callable[..., tuple[Array, ...]]]:
    with _supported_precision(q.dtype):
        return jax.vjp(lambda *x: kernel(*x, numbers), q, k, v)


def _backward(
    kernel: Callable[..., Array], pull_back: Callable[..., tuple[Array, ...]], grad: Array
) -> tuple[Array | None, ...]:
    with _supported_precision(grad.dtype):
        return *pull_back(grad), None


_with_precision.defvjp(_forward, _backward)
