"""LightningDiT with diffusion registers.

Source: DSR lightningDiT.py; paper section "diffusion registers"; spec denoiser 1 and 3.
"""

import math

import flax.linen as nn
import jax.numpy as jnp

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array
from dsr_jax.models.attention import Rope
from dsr_jax.models.blocks import make_norm, make_stack, modulation
from dsr_jax.models.embeddings import (
    FourierTimeEmbed,
    LabelEmbed,
    PatchEmbed,
    sincos_init,
    unpatchify,
)
from dsr_jax.models.layers import Dense, add_param, zeros
from dsr_jax.models.precision import Precision
from dsr_jax.models.rope import rope_tables
from dsr_jax.parallel.axes import Constrain


def check_sizes(
    *,
    input_size: int,
    patch_size: int,
    hidden_size: int,
    num_heads: int,
    depth: int,
    use_rope: bool,
    num_registers: int,
    register_start: int,
) -> None:
    """Checks that sizes fit each other; the original crashes, or worse, where they do not.

    Raises:
      ConfigError: Naming the offending keys and a value that would do.
    """
    if input_size % patch_size:
        raise ConfigError(
            f"config.model.input_size={input_size} is not a multiple of patch_size={patch_size}"
        )
    unit = num_heads * (4 if use_rope else 1)
    if hidden_size % unit or hidden_size % 4:
        raise ConfigError(
            f"config.model.hidden_size={hidden_size} does not divide into num_heads={num_heads} "
            f"heads{' of a multiple of 4 channels, as rope needs' if use_rope else ''}",
            f"use a multiple of {math.lcm(unit, 4)}",
        )
    if not num_registers:
        return
    side = math.isqrt(num_registers)
    if num_registers < 0 or side * side != num_registers:
        raise ConfigError(
            f"config.registers.num={num_registers} is not a square number: registers carry the "
            "positions of a square grid",
            f"use {side * side or 1} or {(side + 1) ** 2}",
        )
    if not 0 <= register_start < depth:
        raise ConfigError(
            f"config.registers.start={register_start} lies outside blocks 0..{depth - 1}",
            "the paper starts at block 4 of 12 and at block 8 of 28",
        )


class FinalLayer(nn.Module):
    """Modulated norm and projection to pixels, zero at the start.

    Attributes:
      features: Outputs p*p*C per token.
      use_rmsnorm: RMSNorm with scale, else LayerNorm without.
      use_norm: False leaves the norm out (final_no_ln).
      precision: Dtype policy.
    """

    features: int
    use_rmsnorm: bool = True
    use_norm: bool = True
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Array, condition: Array) -> Array:
        """Maps tokens [B, N, D] to [B, N, p*p*C] in float32."""
        shift, scale = modulation(condition, 2, x.shape[-1], self.precision)
        if self.use_norm:
            x = make_norm(self.use_rmsnorm, "norm_final", self.precision)(x)
        out = Dense(
            (self.features,),
            ("embed", None),
            kernel_init=zeros,
            precision=self.precision,
            name="linear",
        )(x * (1 + scale) + shift)
        return self.precision.island("output", out)


class LightningDiT(nn.Module):
    """Class-conditional diffusion transformer, optionally with learned register tokens.

    Registers join in front of the patch tokens just before block `register_start`, take part in
    every later block like patches but without rotary position, and are dropped before the final
    layer, in training and in sampling alike. Because the token count changes there, the depth is
    two scanned stacks, `blocks_pre` and `blocks_reg`; without registers one, `blocks`.

    Attributes:
      input_size: Side of the square input.
      patch_size: Side p of a patch.
      in_channels: Channels C of the input.
      hidden_size: Width D.
      depth: Number of blocks.
      num_heads: Attention heads H.
      mlp_ratio: Hidden units of the feed-forward per unit of width.
      num_classes: Classes K; label K means "no class".
      learn_sigma: Predicts 2 C channels, of which the second half is dropped.
      use_qknorm: Normalises q and k.
      use_swiglu: SwiGLU, else an MLP with tanh-GELU.
      use_rope: Rotary position in every block, besides the added sine-cosine table.
      use_rmsnorm: RMSNorm with scale, else LayerNorm without.
      final_norm: Normalises before the output projection.
      attn_kv_bias: Learned extra key and value per block.
      num_registers: Register tokens R, a square number; 0 for none.
      register_start: First block that sees the registers.
      remat: What the backward pass recomputes: "none", "full" or "dots".
      attention: Attention kernel, see `models.attention.attend`.
      precision: Dtype policy.
      constrain: Layout of activations.
    """

    input_size: int
    in_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    num_classes: int
    patch_size: int = 1
    mlp_ratio: float = 4.0
    learn_sigma: bool = False
    use_qknorm: bool = False
    use_swiglu: bool = True
    use_rope: bool = True
    use_rmsnorm: bool = True
    final_norm: bool = True
    attn_kv_bias: bool = False
    num_registers: int = 0
    register_start: int = 0
    remat: str = "none"
    attention: str = "auto"
    precision: Precision = Precision()
    constrain: Constrain = Constrain()

    @nn.compact
    def __call__(self, x: Array, t: Array, labels: Array) -> Array:
        """Predicts what the objective asks for.

        Args:
          x: Noised input [B, h, w, C].
          t: Time [B] in [0, 1], 0 = data, 1 = noise.
          labels: Classes [B] in 0..K.

        Returns:
          [B, h, w, C] in float32.
        """
        self.check_sizes()
        grid = self.input_size // self.patch_size
        tokens = PatchEmbed(self.hidden_size, self.patch_size, self.precision, name="x_embedder")(x)
        self.sow("intermediates", "x_embedder_out", tokens)
        position = self._table("pos_embed", grid**2, sincos_init(grid))
        tokens = self.precision.island("residual", tokens) + position
        time = FourierTimeEmbed(self.hidden_size, precision=self.precision, name="t_embedder")(t)
        label = LabelEmbed(self.num_classes, self.hidden_size, name="y_embedder")(labels)
        condition = self.precision.island("conditioning", time + label)
        self.sow("intermediates", "condition", (time, label, condition))

        tokens = self._blocks(tokens, condition, grid)
        channels = self.in_channels * (2 if self.learn_sigma else 1)
        out = FinalLayer(
            self.patch_size**2 * channels,
            self.use_rmsnorm,
            self.final_norm,
            self.precision,
            name="final_layer",
        )(tokens, condition)
        self.sow("intermediates", "final_tokens", out)
        return unpatchify(out, self.patch_size, channels)[..., : self.in_channels]

    def check_sizes(self) -> None:
        """Raises ConfigError where sizes do not fit each other; see `check_sizes`."""
        check_sizes(
            input_size=self.input_size,
            patch_size=self.patch_size,
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            depth=self.depth,
            use_rope=self.use_rope,
            num_registers=self.num_registers,
            register_start=self.register_start,
        )

    def _table(self, name: str, rows: int, init: nn.initializers.Initializer) -> Array:
        return add_param(self, name, init, (None, "tokens", "embed"), (1, rows, self.hidden_size))

    def _rope(self, grid: int, num_prefix: int = 0) -> Rope | None:
        if not self.use_rope:
            return None
        cos, sin = rope_tables(self.hidden_size // self.num_heads, grid, num_prefix)
        return jnp.asarray(cos), jnp.asarray(sin)

    def _blocks(self, tokens: Array, condition: Array, grid: int) -> Array:
        """Runs the whole depth; returns the patch tokens [B, N, D] alone."""
        num, start = self.num_registers, self.register_start
        if not num:
            return self._stack("blocks", self.depth)(tokens, condition, self._rope(grid))[0]
        if start:
            tokens, _ = self._stack("blocks_pre", start)(tokens, condition, self._rope(grid))
        learned = self._table("register_tokens", num, nn.initializers.normal(1.0))
        # Not `+=`: parameters may be NumPy arrays, which it would change in place.
        registers = learned + self._table("register_pos_embed", num, sincos_init(math.isqrt(num)))
        registers = jnp.broadcast_to(registers, (tokens.shape[0], *registers.shape[1:]))
        tokens = jnp.concatenate([registers, tokens], axis=1)  # [B, R+N, D]
        stack = self._stack("blocks_reg", self.depth - start)
        return stack(tokens, condition, self._rope(grid, num))[0][:, num:]

    def _stack(self, name: str, depth: int) -> nn.Module:
        return make_stack(
            depth,
            self.remat,
            name,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            use_swiglu=self.use_swiglu,
            use_rmsnorm=self.use_rmsnorm,
            use_qknorm=self.use_qknorm,
            attn_kv_bias=self.attn_kv_bias,
            attention=self.attention,
            precision=self.precision,
            constrain=self.constrain,
        )
