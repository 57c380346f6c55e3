"""Multi-head self-attention of the denoisers."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from dsr_jax.core.typing import Array
from dsr_jax.models.kernels import attend
from dsr_jax.models.layers import (
    XAVIER,
    Dense,
    LayerNorm,
    LinearInit,
    RMSNorm,
    SplitDense,
    add_bias,
    add_param,
)
from dsr_jax.models.precision import Precision
from dsr_jax.models.rope import rotate
from dsr_jax.parallel.axes import Constrain

Rope = tuple[Array, Array]
"""Cosines and sines, each [L, K]."""


class Attention(nn.Module):
    """Self-attention with optional q/k norm, rotary embedding and a learned key-value token.

    Attributes:
      num_heads: Heads H; the width must be a multiple.
      use_qknorm: Normalizes q and k per head.
      use_rmsnorm: RMSNorm for q and k, else affine LayerNorm with torch's default epsilon.
      kv_bias: Prepends one learned key and value, not rotated (attn_with_bias).
      gated: Index of the first and number of the tokens whose contribution a learned gate per head
        scales; None for no gate.
      kernel: See `models.kernels.attend`.
      precision: Dtype policy.
      constrain: Layout of activations.
      linear_init: Initialization of the projections.
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

    def __call__(self, x: Array, rope: Rope | None = None) -> Array:
        """Maps [B, L, D] to [B, L, D]."""
        return add_bias(*self.apart(x, rope))

    @nn.compact
    def apart(self, x: Array, rope: Rope | None = None) -> tuple[Array, Array | None]:
        """Returns the result without the bias of the last projection, and the bias."""
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
            q, k = (rotate(self.precision.to_float32("rope", y), *rope) for y in (q, k))
        first = 0
        if self.kv_bias:
            k, v = self._prepend("k_bias", k), self._prepend("v_bias", v)
            first = 1
        names = ("act_batch", "act_len", "act_heads", "act_head_dim")
        q, k, v = (self.constrain(self.precision.to_compute(y), *names) for y in (q, k, v))
        self.sow("intermediates", "qk", (q, k))
        mixed = attend(q, k, v, self.kernel, constrain=self.constrain)
        if self.gated is not None:
            first, count = first + self.gated[0], self.gated[1]
            others = np.r_[:first, first + count : k.shape[1]]
            k, v = k[:, others], v[:, others]
            without = attend(q, k, v, self.kernel, constrain=self.constrain)
            mixed = self._gate(mixed, without)
        return Dense(
            x.shape[-1:],
            ("heads", "head_dim", "embed"),
            num_inputs=2,
            linear_init=self.linear_init,
            precision=self.precision,
            name="proj",
        ).apart(mixed)

    def _norm(self, name: str) -> nn.Module:
        if self.use_rmsnorm:
            return RMSNorm(axis="head_dim", precision=self.precision, name=name)
        return LayerNorm(
            epsilon=1e-5, affine=True, axis="head_dim", precision=self.precision, name=name
        )

    def _gate(self, mixed: Array, without: Array) -> Array:
        """Interpolates from `without` at a gate of 0, its initial value, to `mixed` at 1."""
        zeros = nn.initializers.zeros
        gate = add_param(self, "register_gate", zeros, ("heads",), (self.num_heads,))
        return without + self.precision.to_compute(gate)[:, None] * (mixed - without)

    def _prepend(self, name: str, x: Array) -> Array:
        axes, shape = (None, "heads", None, "head_dim"), (1, x.shape[2], 1, x.shape[3])
        token = add_param(self, name, nn.initializers.normal(0.02), axes, shape)
        token = token.transpose(0, 2, 1, 3)
        token = jnp.broadcast_to(token, (x.shape[0], 1, *x.shape[2:]))
        return jnp.concatenate([token.astype(x.dtype), x], axis=1)
