"""LightningDiT with diffusion registers.

Source: DSR lightningDiT.py; paper section "diffusion registers"; spec denoiser 1 and 3.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import flax.linen as nn

from dsr_jax.core.typing import Array
from dsr_jax.models.conditioning import FOURIER_SEED, TextCondition
from dsr_jax.models.embeddings import FourierTimeEmbed, PatchEmbed
from dsr_jax.models.flops import final_layer_macs, time_macs
from dsr_jax.models.transformer import DiffusionTransformer

DIT: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
        "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
        "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
        "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
    }
)
"""Sizes by their names in the paper. Source: spec denoiser 1.13 (S, B and L are the standard
widths; only XL was released)."""

TEXT_DIT: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {"2.4B": {"hidden_size": 2048, "depth": 32, "num_heads": 32, "condition_width": 2048}}
)
"""Sizes of Scale-RAE's denoiser by name. Source: its script; spec t2i 2.5."""

REGISTER_START: Mapping[str, int] = MappingProxyType({"S": 4, "B": 4, "L": 8, "XL": 8})
"""First block with diffusion registers, by size: XL was released; S and B follow from the paper's
GFLOPs; L is JiT-L's, which has the same depth."""


class LightningDiT(DiffusionTransformer):
    """Class-conditional diffusion transformer, optionally with learned register tokens.

    Registers are dropped before the final layer, in training and in sampling alike.

    Attributes:
      learn_sigma: Predicts 2 C channels, the second half of which is dropped.
      final_norm: Normalizes before the output projection.
      attn_kv_bias: Learned extra key and value per block.
    """

    converter: ClassVar[str] = "dsr_jax.convert.lightningdit:CONVERTER"

    learn_sigma: bool = False
    final_norm: bool = True
    attn_kv_bias: bool = False

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
        tokens = PatchEmbed(self.hidden_size, self.patch_size, self.precision, name="x_embedder")(x)
        self.sow("intermediates", "x_embedder_out", tokens)
        tokens = self.precision.to_residual(tokens + self._positions())
        condition, registers = self._condition(self._embed_time(t), labels)
        tokens = self._run_depth(
            tokens, condition, registers=registers, attn_kv_bias=self.attn_kv_bias
        )
        patches = tokens[:, self.num_registers :]
        out = self._predict(patches, condition, self._out_channels, self.final_norm)
        return out[..., : self.in_channels]

    def forward_flops(self) -> int:
        """Returns the FLOPs of one evaluation on one sample: two per multiply-accumulate."""
        tokens, width, patch = self.grid**2, self.hidden_size, self.patch_size**2
        macs = self._depth_macs(extra_keys=int(self.attn_kv_bias))
        condition = self.condition_width or width
        macs += tokens * patch * self.in_channels * width + time_macs(condition, self.time_features)
        conditions = tokens if self.condition_width else 1
        outputs = patch * self._out_channels
        return 2 * (macs + final_layer_macs(tokens, width, outputs, conditions, condition))

    @property
    def _out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    def _embed_time(self, t: Array) -> Array:
        """Maps t [B] to [B, D], or [B, Z] for text."""
        return FourierTimeEmbed(
            self.condition_width or self.hidden_size,
            self.time_features // 2,
            precision=self.precision,
            seed=FOURIER_SEED if self.condition_width else None,
            name="t_embedder",
        )(t)
