"""DiTDH: a deep narrow encoder, and a wide shallow head that it conditions token by token.

Source: DSR DDT.py (DiTwDDTHead); spec denoiser 2 and 3.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import flax.linen as nn
import jax

from dsr_jax.core.typing import Array
from dsr_jax.models.conditioning import FOURIER_SEED, TextCondition
from dsr_jax.models.depth import Stack, TokenRows
from dsr_jax.models.dit import DIT
from dsr_jax.models.embeddings import FourierTimeEmbed, PatchEmbed
from dsr_jax.models.flops import block_macs, final_layer_macs, time_macs
from dsr_jax.models.layers import TORCH_DEFAULT, Dense
from dsr_jax.models.sizes import check_heads
from dsr_jax.models.transformer import DiffusionTransformer

DIT_DH: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        name: {**sizes, "decoder_hidden_size": 2048, "decoder_depth": 2, "decoder_num_heads": 16}
        for name, sizes in DIT.items()
    }
)
"""Sizes by name: LightningDiT's encoder with the wide head. Source: spec denoiser 2.4 (XL was
released; S is RAE's guide)."""


class DiTDH(DiffusionTransformer):
    """Diffusion transformer with a decoupled head, optionally with learned register tokens.

    The encoder has LightningDiT's blocks and registers. Its output at each position, patch or
    register, is the condition of the head's token at that position. The head embeds the input
    again. Its registers are present from its first block on, each conditioned by the encoder's
    register at the same position, and are dropped before the final layer.

    SiLU is applied twice to both conditions, here and by every modulation, as in the original. The
    original takes patches of one pixel only; larger ones work here as in LightningDiT.

    Attributes:
      decoder_hidden_size: Width E of the head.
      decoder_depth: Blocks of the head.
      decoder_num_heads: Attention heads of the head's blocks.
      use_pos_embed: Adds the sine-cosine table to the encoder's tokens.
    """

    converter: ClassVar[str] = "dsr_jax.convert.dit_dh:CONVERTER"
    stack_prefix: ClassVar[str] = "enc_"

    decoder_hidden_size: int = 2048
    decoder_depth: int = 2
    decoder_num_heads: int = 16
    use_pos_embed: bool = True

    @nn.compact
    def __call__(self, x: Array, t: Array, labels: Array | TextCondition) -> Array:
        """Returns the prediction that the objective defines.

        Args:
          x: Noised input [B, h, w, C].
          t: Time [B] in [0, 1], 0 = data, 1 = noise.
          labels: Classes [B] in 0..K; a text's condition if `condition_width` is set.

        Returns:
          [B, h, w, C] in float32.
        """
        self.check_sizes()
        condition = self._encode(x, t, labels)
        tokens = self._embed_patches("x_embedder", self.decoder_hidden_size, x)
        if self.num_registers:
            tokens = self._add_registers(tokens, "dec_")
        tokens = self._run_stack(
            "dec_blocks",
            self.decoder_depth,
            self.decoder_num_heads,
            tokens,
            condition,
            gated=self._gated(self._head_rows()),
            linear_init=TORCH_DEFAULT,
        )
        tokens, condition = (x[:, self.num_registers :] for x in (tokens, condition))
        return self._predict(tokens, condition, self.in_channels)

    def forward_flops(self) -> int:
        """Returns the FLOPs of one evaluation on one sample: two per multiply-accumulate.

        The head's modulations differ from token to token, so each token has matmuls of its own.
        """
        width, head_width = self.hidden_size, self.decoder_hidden_size
        tokens, inputs = self.grid**2, self.in_channels * self.patch_size**2
        length = tokens + self.num_registers
        macs = self._depth_macs() + self.decoder_depth * block_macs(
            length,
            hidden=head_width,
            mlp_hidden=self._mlp_hidden(head_width),
            use_swiglu=self.use_swiglu,
            conditions=length,
            gated=self.num_registers if self.register_gate else 0,
        )
        # Both parts embed the input; only the head's patch tokens reach the final layer.
        macs += tokens * inputs * (width + head_width)
        macs += length * width * head_width if width != head_width else 0
        macs += final_layer_macs(tokens, head_width, inputs, conditions=tokens)
        return 2 * (macs + time_macs(self.condition_width or width, self.time_features))

    def check_sizes(self) -> None:
        """Checks that sizes fit each other.

        Raises:
          ConfigError: Naming the offending keys and a value that would do.
        """
        super().check_sizes()
        check_heads(self.decoder_hidden_size, self.decoder_num_heads, self.use_rope, "decoder_")

    def token_rows(self) -> tuple[TokenRows, ...]:
        """Returns the rows of tokens in every scanned stack of the network, the head's last."""
        return (*super().token_rows(), self._head_rows())

    def _head_rows(self) -> TokenRows:
        stack = Stack("dec_blocks", self.depth, self.depth + self.decoder_depth)
        return TokenRows(stack, self.num_registers, (0, self.num_registers))

    def _encode(self, x: Array, t: Array, labels: Array | TextCondition) -> Array:
        """Returns the head's conditions [B, R+N, E]."""
        text = bool(self.condition_width)
        time = FourierTimeEmbed(
            self.condition_width or self.hidden_size,
            linear_init=TORCH_DEFAULT,
            precision=self.precision,
            seed=FOURIER_SEED if text else None,
            name="t_embedder",
        )(t)
        condition, registers = self._condition(time, labels, use_silu=True)

        tokens = self._embed_patches("s_embedder", self.hidden_size, x)
        if self.use_pos_embed:
            tokens = self.precision.to_residual(tokens + self._positions())
        tokens = self._run_depth(tokens, condition, registers=registers, linear_init=TORCH_DEFAULT)
        # Scale-RAE's encoder for text adds no time, whose width is another.
        tokens = jax.nn.silu(tokens if text else time[:, None] + tokens)
        tokens = self.precision.to_residual(tokens)
        if self.decoder_hidden_size != self.hidden_size:
            tokens = Dense(
                (self.decoder_hidden_size,),
                ("embed", None),
                linear_init=TORCH_DEFAULT,
                precision=self.precision,
                name="s_projector",
            )(tokens)
        self.sow("intermediates", "s_projected", tokens)
        return self.constrain(tokens, "act_batch", "act_len", "act_embed")

    def _embed_patches(self, name: str, width: int, x: Array) -> Array:
        tokens = PatchEmbed(width, self.patch_size, self.precision, name=name)(x)
        self.sow("intermediates", f"{name}_out", tokens)
        return self.precision.to_residual(tokens)
