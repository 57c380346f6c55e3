"""The modulated transformer block, and stacks of it over depth.

Source: DSR lightningDiT.py (LightningDiTBlock); spec denoiser 1.3.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array
from dsr_jax.models.attention import Attention, Rope
from dsr_jax.models.dropout import ATTENTION_OUTPUT, MLP_HIDDEN, Dropout
from dsr_jax.models.elementwise import gated_residual
from dsr_jax.models.kernels import save_attention
from dsr_jax.models.layers import (
    XAVIER,
    Dense,
    LayerNorm,
    LinearInit,
    Mlp,
    RMSNorm,
    SwiGLU,
    zeros,
)
from dsr_jax.models.precision import Precision
from dsr_jax.models.tuning import tuning
from dsr_jax.models.unstacked import Modulation
from dsr_jax.parallel.axes import Constrain

REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        save_attention,
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What the backward pass keeps of a block, from the fastest to the least memory.

Everything, the outputs of matmuls and attention (what is element-wise is recomputed), or only the
block's input.
"""

KERNELS = ("xla", "triton")
"""What computes the element-wise parts of a block."""

UNROLL = ("auto", "none", "full")
"""Forms of a stack for the compiler: the platform's choice, one block in a loop, all blocks."""


def mlp_width(width: int, mlp_ratio: float, use_swiglu: bool) -> int:
    """Returns the hidden units of the feed-forward layer; SwiGLU has two thirds, rounded down."""
    hidden = int(width * mlp_ratio)
    return int(2 / 3 * hidden) if use_swiglu else hidden


def make_norm(use_rmsnorm: bool, name: str, precision: Precision) -> RMSNorm | LayerNorm:
    """Returns RMSNorm with a learned scale, or LayerNorm without parameters (spec denoiser 1.4)."""
    if use_rmsnorm:
        return RMSNorm(precision=precision, name=name)
    return LayerNorm(precision=precision, name=name)


def modulation(condition: Array, count: int, width: int, precision: Precision) -> tuple[Array, ...]:
    """Returns adaLN's `count` vectors of `width` from SiLU(condition), initially zero.

    Adds the projection `adaLN` to the module whose compact method calls it.

    Args:
      condition: [B, D], or [B, L, D] with one condition per token.
      count: Number of vectors.
      width: Width of the tokens.
      precision: Dtype policy.

    Returns:
      `count` arrays that broadcast over tokens [B, L, width].
    """
    vectors = Dense(
        (count, width),
        ("embed", None, "modulation"),
        kernel_init=zeros,
        precision=precision,
        name="adaLN",
    )(jax.nn.silu(condition))
    return split_modulation(vectors if condition.ndim == 3 else vectors[:, None])


def split_modulation(vectors: Array) -> tuple[Array, ...]:
    """Returns the arrays [B, L, width] of a modulation's vectors [B, L, count, width]."""
    return tuple(vectors[..., i, :] for i in range(vectors.shape[-2]))


class Block(nn.Module):
    """Attention and feed-forward, each between a modulated norm and a gated residual.

    Attributes:
      num_heads: Attention heads.
      mlp_ratio: Hidden units of the feed-forward per unit of width.
      use_swiglu: SwiGLU, else an MLP with tanh-GELU.
      use_rmsnorm: RMSNorm with scale, else LayerNorm without.
      use_qknorm: Normalizes q and k.
      attn_kv_bias: Learned extra key and value.
      gated: Gated tokens, see `models.attention.Attention`.
      attention: Attention kernel.
      precision: Dtype policy.
      constrain: Layout of activations.
      linear_init: Initialization of all linear layers but the modulation, which is zero.
      kernels: Element-wise parts by XLA ("xla"), or by Pallas Triton kernels ("triton", for GPUs;
        interpreted, and slow, elsewhere). Norms and residual sums are left to XLA where conditions
        differ between tokens, with dropout, with intermediates, and where devices split the tokens
        of a sample or their channels; SwiGLU with dropout; GELU always.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    use_swiglu: bool = True
    use_rmsnorm: bool = True
    use_qknorm: bool = False
    attn_kv_bias: bool = False
    gated: tuple[int, int] | None = None
    attention: str = "auto"
    precision: Precision = Precision()
    constrain: Constrain = Constrain()
    linear_init: LinearInit = XAVIER
    kernels: str = "xla"

    @nn.compact
    def __call__(
        self,
        x: Array,
        condition: Array | Modulation,
        rope: Rope | None,
        dropout: Dropout | None = None,
    ) -> tuple[Array, None]:
        """Maps tokens [B, L, D] to [B, L, D]; returned as a scan's (carry, output).

        The condition is [B, D], or [B, L, D] with one per token, or the modulation that was made
        from it. Dropout acts on the output of attention and on the hidden units of the feed-forward
        layer.
        """
        width = x.shape[-1]
        x = self.constrain(x, "act_batch", "act_len", "act_embed")
        if isinstance(condition, Modulation):
            vectors = split_modulation(condition.vectors[:, None])
        else:
            vectors = modulation(condition, 6, width, self.precision)
        if self._fits_kernels(x, vectors, dropout):
            return self._run_kernels(x, vectors, rope), None
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = vectors
        self.sow("intermediates", "modulation_out", vectors)

        norm = self._norm("norm1")
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "norm1_out", norm(x))
        mixed = self._attention()(norm(x, shift_attn, scale_attn), rope)
        mixed = mixed if dropout is None else dropout(mixed, ATTENTION_OUTPUT)
        self.sow("intermediates", "attn_out", mixed)
        x = gated_residual(x, gate_attn, mixed, self.constrain)

        norm = self._norm("norm2")
        drop = None if dropout is None else lambda hidden: dropout(hidden, MLP_HIDDEN)
        mixed = self._feed_forward(width)(norm(x, shift_mlp, scale_mlp), drop)
        self.sow("intermediates", "mlp_out", mixed)
        x = gated_residual(x, gate_mlp, mixed, self.constrain)
        self.sow("intermediates", "block_out", x)
        return x, None

    def _fits_kernels(self, x: Array, vectors: tuple[Array, ...], dropout: Dropout | None) -> bool:
        """Whether norms and residual sums run as Triton kernels, see the attribute `kernels`."""
        if self.kernels != "triton":
            return False
        from dsr_jax.models.triton_norm import fits_kernels  # Imports Pallas only if used.

        watched = self.is_mutable_collection("intermediates")
        per_sample = all(vector.shape[1] == 1 for vector in vectors)
        return (
            per_sample and dropout is None and not watched and fits_kernels(x.shape, self.constrain)
        )

    def _run_kernels(self, x: Array, vectors: tuple[Array, ...], rope: Rope | None) -> Array:
        """Computes the block with norms and residual sums as Triton kernels."""
        from dsr_jax.models.triton_norm import NormKernel, branch_norm, residual, residual_norm

        wide = (vector[:, 0].astype(jnp.float32) for vector in vectors)
        shift_attn, factor_attn, gate_attn, shift_mlp, factor_mlp, gate_mlp = wide
        norm1, norm2 = self._norm("norm1"), self._norm("norm2")
        how = NormKernel(
            norm1.epsilon, not self.use_rmsnorm, self.precision.compute, self.constrain
        )
        x, h = branch_norm(x, _multiplier(norm1, factor_attn), shift_attn, how)
        mixed, bias = self._attention().apart(h, rope)
        x, h = residual_norm(
            x,
            mixed,
            gate_attn,
            _offset(gate_attn, bias),
            _multiplier(norm2, factor_mlp),
            shift_mlp,
            how,
        )
        mixed, bias = self._feed_forward(x.shape[-1]).apart(h)
        return residual(x, mixed, gate_mlp, _offset(gate_mlp, bias), how)

    def _norm(self, name: str) -> RMSNorm | LayerNorm:
        return make_norm(self.use_rmsnorm, name, self.precision)

    def _attention(self) -> Attention:
        return Attention(
            self.num_heads,
            self.use_qknorm,
            self.use_rmsnorm,
            self.attn_kv_bias,
            self.gated,
            self.attention,
            self.precision,
            self.constrain,
            self.linear_init,
            name="attn",
        )

    def _feed_forward(self, width: int) -> SwiGLU | Mlp:
        hidden = mlp_width(width, self.mlp_ratio, self.use_swiglu)
        shared: Any = {"linear_init": self.linear_init, "precision": self.precision, "name": "mlp"}
        if not self.use_swiglu:
            return Mlp(hidden, **shared)
        return SwiGLU(hidden, kernels=self.kernels, constrain=self.constrain, **shared)


def _multiplier(norm: RMSNorm | LayerNorm, factor: Array) -> Array:
    """Returns what a norm with modulation multiplies by [B, D], in float32."""
    multiplier = 1 + factor
    if isinstance(norm, RMSNorm):
        multiplier = norm.scale(factor.shape[-1]).astype(jnp.float32) * multiplier
    return multiplier


def _offset(gate: Array, bias: Array | None) -> Array:
    """Returns what the bias of a branch adds to the residual stream [B, D], in float32."""
    return jnp.zeros_like(gate) if bias is None else gate * bias.astype(jnp.float32)


def is_unrolled(unroll: str, width: int, remat: str = "none") -> bool:
    """Whether the depth is unrolled for the compiler; Args as in `make_stack`."""
    choice = tuning()
    return unroll == "full" or (
        unroll == "auto"
        and width >= choice.unroll_width
        and (remat == "none" or choice.unroll_remat)
    )


def make_stack(
    depth: int,
    width: int,
    remat: str,
    name: str | None,
    block: type[nn.Module] = Block,
    in_axes: tuple[Any, ...] = (nn.broadcast, nn.broadcast),
    unroll: str = "auto",
    **attributes: Any,
) -> nn.Module:
    """Returns `depth` blocks; parameters and intermediates get a leading layer axis.

    Args:
      depth: Number of blocks.
      width: Channels of a token.
      remat: A name in REMAT_POLICIES.
      name: The stack's name in the parameter tree; None in a `setup` method, which names it.
      block: Class of the blocks, which return (carry, None).
      in_axes: For each input after the carry, the axis that the scan runs over, or `nn.broadcast`.
      unroll: A name in UNROLL. It changes the compiled program and nothing else: "auto"
        follows the platform's `Tuning`.
      **attributes: Attributes of each block.

    Raises:
      ConfigError: If one of the names is unknown.
    """
    for key, value, known in (("remat", remat, REMAT_POLICIES), ("unroll", unroll, UNROLL)):
        if value not in known:
            raise ConfigError(
                f"config.model.{key}={value!r} is unknown", f"choose from {', '.join(known)}"
            )
    unrolled = is_unrolled(unroll, width, remat)
    target: Any = block
    if remat != "none":
        # Without barriers the compiler finds the values that an unrolled backward pass recomputes
        # among those of the forward pass, and keeps them all. A loop is such a barrier itself.
        target = nn.remat(block, prevent_cse=unrolled, policy=REMAT_POLICIES[remat])
    return nn.scan(
        target,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=depth,
        unroll=depth if unrolled else 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(name=name, **attributes)
