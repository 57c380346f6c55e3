"""Multi-head self-attention, and the one function through which every network attends."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array
from dsr_jax.models.layers import (
    XAVIER,
    Dense,
    LayerNorm,
    LinearInit,
    RMSNorm,
    SplitDense,
    add_param,
)
from dsr_jax.models.precision import Precision
from dsr_jax.models.rope import rotate
from dsr_jax.parallel.axes import Constrain

ATTENTION_RESIDUALS = "attention_residuals"
"""Name under which rematerialisation may keep what attention's backward pass needs."""

Rope = tuple[Array, Array]
"""Cosines and sines, each [L, K]."""


def _scores(q: Array, k: Array) -> Array:
    return jnp.einsum("bhlk,bhmk->bhlm", q, k, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _attend_einsum(q: Array, k: Array, v: Array) -> Array:
    """Attention whose backward pass recomputes the weights, for platforms without a kernel.

    Differentiating plain softmax attention keeps several [B, H, L, M] arrays; in a scan over
    depth they are written to stacked buffers, which took a sixth of a training step on a CPU.
    Kept here are the output and one log-sum per query, as in flash attention.
    """
    return _einsum_forward(q, k, v)[0]


def _einsum_forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
    dtype = q.dtype
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * q.shape[-1] ** -0.5, k, v))
    scores = _scores(q, k)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # Dividing the [B, H, L, K] result instead of the weights saves a pass over the larger array.
    out = jnp.einsum("bhlm,bhmk->bhlk", weights.astype(dtype), v).astype(jnp.float32) / total
    out = checkpoint_name(out.astype(dtype), ATTENTION_RESIDUALS)
    log_sum = checkpoint_name(peak + jnp.log(total), ATTENTION_RESIDUALS)
    return out.transpose(0, 2, 1, 3), (q, k, v, out, log_sum)


def _einsum_backward(kept: tuple[Array, ...], grad: Array) -> tuple[Array, Array, Array]:
    q, k, v, out, log_sum = kept
    grad = grad.transpose(0, 2, 1, 3)
    weights = jnp.exp(_scores(q, k) - log_sum)
    grad_v = jnp.einsum("bhlm,bhlk->bhmk", weights.astype(grad.dtype), grad)
    along = jnp.sum((grad * out).astype(jnp.float32), axis=-1, keepdims=True)
    grad_scores = (weights * (_scores(grad, v) - along)).astype(q.dtype)
    grad_q = jnp.einsum("bhlm,bhmk->bhlk", grad_scores, k) * q.shape[-1] ** -0.5
    grad_k = jnp.einsum("bhlm,bhlk->bhmk", grad_scores, q)
    grads = (x.transpose(0, 2, 1, 3) for x in (grad_q, grad_k, grad_v))
    return tuple(grads)  # type: ignore[return-value]


_attend_einsum.defvjp(_einsum_forward, _einsum_backward)


def _attend_xla(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")


def _attend_cudnn(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


_CUDNN_CHANNELS = 128
"""Channels of a head that cudnn takes on all GPUs; the VAE's one head has 512."""

_KERNELS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "einsum": _attend_einsum,
    "xla": _attend_xla,
    "cudnn": _attend_cudnn,
}


def target_platform() -> str:
    """The platform that the traced program is for: that of `jax.set_mesh`, else of this process.

    The two differ where a CPU compiles ahead of time for devices that it does not have.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def attend(q: Array, k: Array, v: Array, kernel: str = "auto") -> Array:
    """Softmax attention without mask, scores and softmax in float32.

    Args:
      q: Queries [B, L, H, K], scaled by 1/sqrt(K) inside.
      k: Keys [B, M, H, K].
      v: Values [B, M, H, K].
      kernel: "einsum", "xla", "cudnn" (bfloat16 on a GPU), or "auto": by `target_platform`,
        einsum on a CPU, cudnn for bfloat16 on a GPU where heads have no more channels than it
        takes, xla elsewhere.

    Returns:
      [B, L, H, K] in the dtype of `q`.

    Raises:
      ConfigError: If the kernel's name is unknown.
    """
    if kernel == "auto":
        platform = target_platform()
        cudnn = platform == "gpu" and q.dtype == jnp.bfloat16 and q.shape[-1] <= _CUDNN_CHANNELS
        kernel = "einsum" if platform == "cpu" else "cudnn" if cudnn else "xla"
    if kernel not in _KERNELS:
        raise ConfigError(
            f"config.model.attention={kernel!r}", f"choose from auto, {', '.join(_KERNELS)}"
        )
    return _KERNELS[kernel](q, k, v)


class Attention(nn.Module):
    """Self-attention with optional q/k norm, rotary embedding and a learned key-value token.

    Attributes:
      num_heads: Heads H; the width must be a multiple.
      use_qknorm: Normalises q and k per head.
      use_rmsnorm: RMSNorm for q and k, else affine LayerNorm with torch's default epsilon.
      kv_bias: Prepends one learned key and value, not rotated (attn_with_bias).
      gated: First place and number of tokens that count as far as a learned gate per head lets
        them; None for no gate.
      kernel: See `attend`.
      precision: Dtype policy.
      constrain: Layout of activations.
      linear_init: Start of the projections.
    """

    num_heads: int
    use_qknorm: bool = False
    use_rmsnorm: bool = True
    kv_bias: bool = False
    gated: tuple[int, int] | None = None
    kernel: str = "auto"
    precision: Precision = Precision()
    constrain: Constrain = Constrain()
    linear_init: LinearInit = XAVIER

    @nn.compact
    def __call__(self, x: Array, rope: Rope | None = None) -> Array:
        """Maps [B, L, D] to [B, L, D]."""
        heads, head_dim = self.num_heads, x.shape[-1] // self.num_heads
        q, k, v = SplitDense(
            3,
            (heads, head_dim),
            ("embed", "heads", "head_dim"),
            linear_init=self.linear_init,
            precision=self.precision,
            name="qkv",
        )(x)
        if self.use_qknorm:
            q, k = self._norm("q_norm")(q), self._norm("k_norm")(k)
        if rope is not None:
            q, k = (rotate(self.precision.island("rope", y), *rope) for y in (q, k))
        first = 0
        if self.kv_bias:
            k, v = self._prepend("k_bias", k), self._prepend("v_bias", v)
            first = 1
        names = ("act_batch", "act_len", "act_heads", "act_head_dim")
        q, k, v = (self.constrain(self.precision.product(y), *names) for y in (q, k, v))
        mixed = attend(q, k, v, self.kernel)
        if self.gated is not None:
            first, count = first + self.gated[0], self.gated[1]
            places = np.r_[:first, first + count : k.shape[1]]
            without = attend(q, k[:, places], v[:, places], self.kernel)
            mixed = self._gate(mixed, without)
        return Dense(
            x.shape[-1:],
            ("heads", "head_dim", "embed"),
            num_inputs=2,
            linear_init=self.linear_init,
            precision=self.precision,
            name="proj",
        )(mixed)

    def _norm(self, name: str) -> nn.Module:
        if self.use_rmsnorm:
            return RMSNorm(axis="head_dim", precision=self.precision, name=name)
        return LayerNorm(
            epsilon=1e-5, affine=True, axis="head_dim", precision=self.precision, name=name
        )

    def _gate(self, mixed: Array, without: Array) -> Array:
        """`without` at a gate of 0, where training starts, and `mixed` at 1; each [B, L, H, K]."""
        zeros = nn.initializers.zeros
        gate = add_param(self, "register_gate", zeros, ("heads",), (self.num_heads,))
        return without + self.precision.product(gate)[:, None] * (mixed - without)

    def _prepend(self, name: str, x: Array) -> Array:
        axes, shape = (None, "heads", None, "head_dim"), (1, x.shape[2], 1, x.shape[3])
        token = add_param(self, name, nn.initializers.normal(0.02), axes, shape)
        token = token.transpose(0, 2, 1, 3)
        token = jnp.broadcast_to(token, (x.shape[0], 1, *x.shape[2:]))
        return jnp.concatenate([token.astype(x.dtype), x], axis=1)
