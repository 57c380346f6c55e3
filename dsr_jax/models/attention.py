"""Multi-head self-attention of the denoisers."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from dsr_jax.core.errors import ConfigError
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
      kernel: See `models.kernels.attend`; or "triton", which reads the fused projection
        (`models.triton_attention`) and has neither q/k norm, kv_bias nor gated tokens.
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
        packed = self.kernel == "triton"
        mixed = self._packed(x, rope) if packed else self._mixed(x, rope)
        return self._project_out(x.shape[-1]).apart(mixed)

    def _mixed(self, x: Array, rope: Rope | None) -> Array:
        """Computes attention of the tokens [B, L, D]; returns [B, L, H, K]."""
        q, k, v = self._project_in(x.shape[-1])(x)
        if self.use_qknorm:
            q, k = self._norm("q_norm")(q), self._norm("k_norm")(k)
        q, k = self._rotated(q, rope), self._rotated(k, rope)
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
        return mixed

    def _project_in(self, width: int) -> SplitDense:
        return SplitDense(
            3,
            (self.num_heads, width // self.num_heads),
            ("embed", "heads", "head_dim"),
            linear_init=self.linear_init,
            precision=self.precision,
            name="qkv",
        )

    def _project_out(self, width: int) -> Dense:
        return Dense(
            (width,),
            ("heads", "head_dim", "embed"),
            num_inputs=2,
            linear_init=self.linear_init,
            precision=self.precision,
            name="proj",
        )

    def _packed(self, x: Array, rope: Rope | None) -> Array:
        """Computes attention of the tokens [B, L, D] by kernels that read the fused projection."""
        from dsr_jax.models.triton_attention import attend_packed  # Imports Pallas only if used.

        self._check_packed()
        qkv, bias = self._project_in(x.shape[-1]).apart(x)
        names = ("act_batch", "act_len", None, "act_heads", "act_head_dim")
        qkv = self.constrain(qkv, *names)
        if self.is_mutable_collection("intermediates"):
            whole = add_bias(qkv, bias)
            q, k = self._rotated(whole[:, :, 0], rope), self._rotated(whole[:, :, 1], rope)
            self.sow("intermediates", "qk", (q, k))
        return attend_packed(qkv, bias, rope, self.constrain)

    def _check_packed(self) -> None:
        unsupported = {
            "model.use_qknorm": self.use_qknorm,
            "model.attn_kv_bias": self.kv_bias,
            "registers.gate": self.gated is not None,
        }
        for key, used in unsupported.items():
            if used:
                raise ConfigError(
                    f"config.model.attention='triton' with config.{key}: its kernels support "
                    "neither normalized q and k nor keys and values without a token, nor gates",
                    "use config.model.attention=auto",
                )

    def _rotated(self, x: Array, rope: Rope | None) -> Array:
        """Rotates q or k [B, L, H, K] in float32; returns the compute dtype."""
        if rope is not None:
            x = rotate(x, *rope)
        return self.precision.to_compute(x)

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
