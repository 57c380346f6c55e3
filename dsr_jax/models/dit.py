"""LightningDiT with diffusion registers.

Source: DSR lightningDiT.py; paper section "diffusion registers"; spec denoiser 1 and 3.
"""

import flax.linen as nn

from dsr_jax.core.typing import Array
from dsr_jax.models.denoiser import DiffusionTransformer
from dsr_jax.models.embeddings import FourierTimeEmbed, LabelEmbed, PatchEmbed


class LightningDiT(DiffusionTransformer):
    """Class-conditional diffusion transformer, optionally with learned register tokens.

    Registers are dropped before the final layer, in training and in sampling alike.

    Attributes:
      learn_sigma: Predicts 2 C channels, of which the second half is dropped.
      final_norm: Normalises before the output projection.
      attn_kv_bias: Learned extra key and value per block.
    """

    learn_sigma: bool = False
    final_norm: bool = True
    attn_kv_bias: bool = False

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
        tokens = PatchEmbed(self.hidden_size, self.patch_size, self.precision, name="x_embedder")(x)
        self.sow("intermediates", "x_embedder_out", tokens)
        tokens = self.precision.to_float32("residual", tokens) + self._positions()
        time = self._embed_time(t)
        label = LabelEmbed(self.num_classes, self.hidden_size, name="y_embedder")(labels)
        condition = self.precision.to_float32("conditioning", time + label)
        self.sow("intermediates", "condition", (time, label, condition))

        tokens = self._run_depth(tokens, condition, attn_kv_bias=self.attn_kv_bias)
        channels = self.in_channels * (2 if self.learn_sigma else 1)
        patches = tokens[:, self.num_registers :]
        return self._predict(patches, condition, channels, self.final_norm)[..., : self.in_channels]

    def _embed_time(self, t: Array) -> Array:
        """Maps t [B] to [B, D]."""
        return FourierTimeEmbed(
            self.hidden_size, self.time_features // 2, precision=self.precision, name="t_embedder"
        )(t)
