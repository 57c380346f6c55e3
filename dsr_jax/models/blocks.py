"""The modulated transformer block, and stacks of it over depth.

Source: DSR lightningDiT.py (LightningDiTBlock); spec denoiser 1.3.
"""

from typing import Any

import flax.linen as nn
import jax

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

UNROLL = ("auto", "none", "full")
"""Forms of a stack for the compiler: the platform's choice, one block in a loop, all blocks."""


def mlp_width(width: int, mlp_ratio: float, use_swiglu: bool) -> int:
    """Returns the hidden units of the feed-forward layer; SwiGLU has two thirds, rounded down."""
    hidden = int(width * mlp_ratio)
    return int(2 / 3 * hidden) if use_swiglu else hidden


def make_norm(use_rmsnorm: bool, name: str, precision: Precision) -> nn.Module:
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

        def drop(x: Array, site: int) -> Array:
            return x if dropout is None else dropout(x, site)

        width = x.shape[-1]
        x = self.constrain(x, "act_batch", "act_len", "act_embed")
        if isinstance(condition, Modulation):
            vectors = split_modulation(condition.vectors[:, None])
        else:
            vectors = modulation(condition, 6, width, self.precision)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = vectors
        self.sow("intermediates", "modulation_out", vectors)

        norm = make_norm(self.use_rmsnorm, "norm1", self.precision)
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "norm1_out", norm(x))
        mixed = Attention(
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
        )(norm(x, shift_attn, scale_attn), rope)
        mixed = drop(mixed, ATTENTION_OUTPUT)
        self.sow("intermediates", "attn_out", mixed)
        x = gated_residual(x, gate_attn, mixed, self.constrain)

        norm = make_norm(self.use_rmsnorm, "norm2", self.precision)
        mixed = self._feed_forward(width)(
            norm(x, shift_mlp, scale_mlp), lambda hidden: drop(hidden, MLP_HIDDEN)
        )
        self.sow("intermediates", "mlp_out", mixed)
        x = gated_residual(x, gate_mlp, mixed, self.constrain)
        self.sow("intermediates", "block_out", x)
        return x, None

    def _feed_forward(self, width: int) -> nn.Module:
        hidden = mlp_width(width, self.mlp_ratio, self.use_swiglu)
        kind = SwiGLU if self.use_swiglu else Mlp
        return kind(hidden, linear_init=self.linear_init, precision=self.precision, name="mlp")


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
