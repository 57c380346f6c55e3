"""Softmax attention by einsum, XLA, cuDNN or splash; every network calls `attend`."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.sharding import PartitionSpec

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array
from dsr_jax.models.segments import Segments, pad_lengths
from dsr_jax.models.tuning import target_platform, tuning
from dsr_jax.parallel.axes import Constrain

ATTENTION_RESIDUALS = "attention_residuals"
"""Checkpoint name of attention's residuals, which rematerialization may keep."""

_CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"
"""JAX's primitive of cuDNN's forward pass, whose results have no checkpoint name.

Source: jax/_src/cudnn/fused_attention_stablehlo.py.
"""


def save_attention(primitive: Primitive, *inputs: Any, **params: Any) -> bool:
    """Rematerialization policy that saves the residuals of attention, whichever kernel it uses."""
    if primitive.name == _CUDNN_FORWARD:
        return True
    by_name = jax.checkpoint_policies.save_only_these_names(ATTENTION_RESIDUALS)
    return bool(by_name(primitive, *inputs, **params))


_FORBIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Score of a masked key: finite, so that a row without keys does not divide 0 by 0."""


def _scores(q: Array, k: Array, segments: Segments | None = None) -> Array:
    scores = jnp.einsum("bhlk,bhmk->bhlm", q, k, preferred_element_type=jnp.float32)
    return scores if segments is None else jnp.where(segments.mask, scores, _FORBIDDEN)


@jax.custom_vjp
def _attend_einsum(q: Array, k: Array, v: Array, segments: Segments | None) -> Array:
    """Computes attention without a kernel; the backward pass recomputes the weights.

    Differentiating plain softmax attention keeps several [B, H, L, M] arrays; in a scan over
    depth they are written to stacked buffers, which took a sixth of a training step on a CPU.
    This keeps only the output and one log-sum per query, as flash attention does.
    """
    return _einsum_forward(q, k, v, segments)[0]


_Kept = tuple[Array, Array, Array, Segments | None, Array, Array]


def _einsum_forward(q: Array, k: Array, v: Array, segments: Segments | None) -> tuple[Array, _Kept]:
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * q.shape[-1] ** -0.5, k, v))
    # Blocks of equal size.
    most = tuning().query_rows or q.shape[2]
    rows = math.ceil(q.shape[2] / math.ceil(q.shape[2] / most))
    blocks = []
    for start in range(0, q.shape[2], rows):
        chosen = slice(start, start + rows)
        here = segments and Segments(segments.q[:, chosen], segments.kv)
        blocks.append(_einsum_rows(q[:, :, chosen], k, v, here))
    out, log_sum = (jnp.concatenate(parts, axis=2) for parts in zip(*blocks, strict=True))
    out = checkpoint_name(out, ATTENTION_RESIDUALS)
    log_sum = checkpoint_name(log_sum, ATTENTION_RESIDUALS)
    return out.transpose(0, 2, 1, 3), (q, k, v, segments, out, log_sum)


def _einsum_rows(q: Array, k: Array, v: Array, segments: Segments | None) -> tuple[Array, Array]:
    """Returns output [B, H, L, K] and log-sums [B, H, L, 1] of scaled queries [B, H, L, K]."""
    scores = _scores(q, k, segments)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # Dividing the [B, H, L, K] result instead of the weights saves a pass over the larger array.
    out = jnp.einsum("bhlm,bhmk->bhlk", weights.astype(q.dtype), v).astype(jnp.float32) / total
    return out.astype(q.dtype), peak + jnp.log(total)


def _einsum_backward(kept: _Kept, grad: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, segments, out, log_sum = kept
    grad = grad.transpose(0, 2, 1, 3)
    weights = jnp.exp(_scores(q, k, segments) - log_sum)
    grad_v = jnp.einsum("bhlm,bhlk->bhmk", weights.astype(grad.dtype), grad)
    along = jnp.sum((grad * out).astype(jnp.float32), axis=-1, keepdims=True)
    grad_scores = (weights * (_scores(grad, v) - along)).astype(q.dtype)
    grad_q = jnp.einsum("bhlm,bhmk->bhlk", grad_scores, k) * q.shape[-1] ** -0.5
    grad_k = jnp.einsum("bhlm,bhlk->bhmk", grad_scores, q)
    grad_q, grad_k, grad_v = (x.transpose(0, 2, 1, 3) for x in (grad_q, grad_k, grad_v))
    return grad_q, grad_k, grad_v, None


_attend_einsum.defvjp(_einsum_forward, _einsum_backward)


def _attend_xla(q: Array, k: Array, v: Array, segments: Segments | None) -> Array:
    mask = None if segments is None else segments.mask
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")


def _attend_cudnn(q: Array, k: Array, v: Array, segments: Segments | None) -> Array:
    if segments is None:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    length = q.shape[1]
    # With a mask, its backward pass takes even lengths alone.
    q, k, v, segments = pad_lengths(q, k, v, segments, 2)
    mask = None if segments is None else segments.mask
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
    return out[:, :length]


_FUSED_CHANNELS = 128
"""Largest head size that cuDNN supports on all GPUs, and a TPU's lanes; the VAE's head has 512."""

_CUDNN_MULTIPLE = 8
"""cuDNN supports head sizes that are a multiple of this.

Source: jax/_src/cudnn/fused_attention_stablehlo.py, check_is_flash_attention.
"""


def _fits_cudnn(q: Array) -> bool:
    """Whether cuDNN supports these queries' dtype and head size on every GPU."""
    size = q.shape[-1]
    return q.dtype == jnp.bfloat16 and size <= _FUSED_CHANNELS and size % _CUDNN_MULTIPLE == 0


_KERNELS: dict[str, Callable[[Array, Array, Array, Segments | None], Array]] = {
    "einsum": _attend_einsum,
    "xla": _attend_xla,
    "cudnn": _attend_cudnn,
}


def _attend_causal(q: Array, k: Array, v: Array, segments: Segments | None, kernel: str) -> Array:
    """Computes causal attention by XLA or cuDNN; k and v may have fewer heads than q."""
    mask = None if segments is None else segments.mask
    implementation: Any = "cudnn" if kernel == "cudnn" else "xla"
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=True, implementation=implementation
    )


def _attend_splash(
    q: Array,
    k: Array,
    v: Array,
    segments: Segments | None,
    constrain: Constrain | None,
    causal: bool,
) -> Array:
    """Runs splash on each device, since the compiler cannot partition a custom kernel."""
    from dsr_jax.models.splash import attend_splash  # Imports Pallas only if used.

    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    interpret = target_platform() != "tpu"
    attend_here = partial(
        attend_splash, residuals=ATTENTION_RESIDUALS, causal=causal, interpret=interpret
    )
    if constrain is None:
        return attend_here(q, k, v, segments)
    spec = constrain.fitted_spec(q.shape, ("act_batch", None, "act_heads", None))
    specs = (spec, spec, spec, PartitionSpec(spec[0]))
    return constrain.on_each_device(attend_here, specs, spec)(q, k, v, segments)


_HALF = (jnp.bfloat16, jnp.float16)


def _choose(q: Array, constrain: Constrain | None) -> str:
    platform = target_platform()
    if platform == "cpu":
        return "einsum"
    if q.dtype != jnp.bfloat16 or q.shape[-1] > _FUSED_CHANNELS:
        return "xla"
    if platform == "gpu":
        return "cudnn" if _fits_cudnn(q) else "xla"
    # Without a mesh it is unknown whether samples are split over several devices.
    placed = constrain is not None and constrain.mesh is not None
    return "splash" if platform == "tpu" and placed else "xla"


def attend(
    q: Array,
    k: Array,
    v: Array,
    kernel: str = "auto",
    *,
    segments: Segments | None = None,
    constrain: Constrain | None = None,
    causal: bool = False,
) -> Array:
    """Computes softmax attention, with scores and softmax in float32.

    Args:
      q: Queries [B, L, H, K], scaled by 1/sqrt(K) inside.
      k: Keys [B, M, H, K].
      v: Values [B, M, H, K].
      kernel: "einsum", "xla", "cudnn" (bfloat16 on a GPU), "splash" (for TPUs; interpreted, and
        slow, elsewhere), or "auto": by `target_platform`, einsum on a CPU and, for bfloat16 and
        heads of at most 128 channels, cudnn on a GPU (if the head size is a multiple of 8) and
        splash on a TPU, where `constrain` has a mesh; xla elsewhere. "triton" is for
        `models.attention.Attention` alone. docs/performance.md has the comparison.
      segments: Segments of positions that attend to each other; None for all to all.
      constrain: Layout of activations, by which splash runs on each device's samples and heads;
        None for a single device.
      causal: A query attends to no key behind its own position. Then k and v may have fewer heads,
        of which each serves as many consecutive heads of q (grouped queries), and einsum runs as
        xla.

    Returns:
      [B, L, H, K] in the dtype of `q`.

    Raises:
      ConfigError: If the kernel's name is unknown, or cudnn does not support the heads.
    """
    if kernel == "auto":
        kernel = _choose(q, constrain)
    if kernel == "splash":
        return _attend_splash(q, k, v, segments, constrain, causal)
    if kernel == "triton":
        raise ConfigError(
            "config.model.attention='triton' reads q, k and v out of their fused projection, which "
            "this network does not have: it supports the blocks of lightningdit, ditdh and sit",
            "use config.model.attention=auto",
        )
    if kernel not in _KERNELS:
        raise ConfigError(
            f"config.model.attention={kernel!r} is unknown",
            f"choose from auto, {', '.join(_KERNELS)}, splash, triton",
        )
    if kernel == "cudnn" and (q.dtype not in _HALF or q.shape[-1] % _CUDNN_MULTIPLE):
        raise ConfigError(
            f"config.model.attention='cudnn' for {q.dtype} heads of {q.shape[-1]} channels: cuDNN "
            f"supports bfloat16 and float16, and multiples of {_CUDNN_MULTIPLE}",
            "use config.model.attention=auto",
        )
    if causal:
        return _attend_causal(q, k, v, segments, kernel)
    return _KERNELS[kernel](q, k, v, segments)
