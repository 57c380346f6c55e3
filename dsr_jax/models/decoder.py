"""The ViT decoder of the representation autoencoder: latents on a grid to images.

Source: RAE and DSR stage1/decoders (GeneralDecoder); spec encoder 7.
"""

from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array
from dsr_jax.models.embeddings import sincos_2d, unpatchify
from dsr_jax.models.layers import TORCH_DEFAULT, Dense, LayerNorm, add_param, zeros
from dsr_jax.models.precision import Precision
from dsr_jax.models.resample import resample
from dsr_jax.models.vit import ViTConfig, make_vit_stack
from dsr_jax.parallel.axes import Constrain


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder.

    Attributes:
      latent_channels: Channels C of the latents.
      grid: Side of the grid of patches that the position table covers, and of the output.
      patch_size: Side P of a patch of the image.
      hidden_size: Width D.
      depth: Blocks L.
      num_heads: Attention heads H.
      mlp_dim: Hidden MLP units M.
      layer_norm_eps: Epsilon of every norm.
    """

    latent_channels: int
    grid: int
    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_dim: int
    layer_norm_eps: float = 1e-12

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return self.grid * self.patch_size

    @property
    def blocks(self) -> ViTConfig:
        """Config of the blocks, which are those of MAE's encoder.

        Raises:
          ConfigError: If the width is not a multiple of the heads.
        """
        return ViTConfig(
            family="mae",
            image_size=self.image_size,
            patch_size=self.patch_size,
            hidden_size=self.hidden_size,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            layer_norm_eps=self.layer_norm_eps,
            use_cls=True,
            torch_init=True,
        )


class DecoderOutput(NamedTuple):
    """Output of a decoder, in float32.

    Attributes:
      logits: Patches as vectors [B, grid**2, P * P * 3]: row in patch, column, channel.
      image: The same as an image [B, grid * P, grid * P, 3]; still normalized by mean and
        standard deviation of the encoder's pixels.
    """

    logits: Array
    image: Array


class ViTDecoder(nn.Module):
    """Decodes tokens on a square grid; its blocks have stacked parameters.

    With `mutable=["intermediates"]` it sows "embeddings" [B, 1+N, D], the input of the first
    block, and "blocks/block_out" [L, B, 1+N, D].

    Attributes:
      config: Sizes.
      attention: Attention kernel, see `models.kernels.attend`.
      precision: Dtype policy.
      constrain: Layout of activations.
      remat: Rematerialization in the backward pass: "none", "full" or "dots".
      unroll: Form of the depth for the compiler, see `models.blocks.make_stack`.
    """

    config: DecoderConfig
    attention: str = "auto"
    precision: Precision = Precision()
    constrain: Constrain = Constrain()
    remat: str = "none"
    unroll: str = "auto"

    @nn.compact
    def __call__(self, tokens: Array, drop_first: bool = False) -> DecoderOutput:
        """Decodes latents.

        Args:
          tokens: [B, T, C], row-major on a square grid. If the grid differs from the
            config's, it is resampled after the first projection.
          drop_first: Drops the first token, a class token.

        Raises:
          ConfigError: If the number of channels is wrong, or the tokens do not form a square.
        """
        config = self.config
        side = self._check(tokens, drop_first)
        x = Dense(
            (config.hidden_size,),
            ("channels", "embed"),
            precision=self.precision,
            name="embed",
            linear_init=TORCH_DEFAULT,
        )(tokens[:, int(drop_first) :])
        x = self.precision.to_residual(x).reshape(len(x), side, side, -1)
        x = resample(x, config.grid, config.grid, "bilinear").reshape(len(x), config.grid**2, -1)
        x = self._add_positions(x)
        self.sow("intermediates", "embeddings", x)
        blocks = make_vit_stack(
            config.blocks,
            self.attention,
            self.precision,
            self.constrain,
            self.remat,
            self.unroll,
        )
        x, _ = blocks(x, None, None)
        x = LayerNorm(config.layer_norm_eps, affine=True, precision=self.precision, name="norm")(
            x[:, 1:]
        )
        logits = Dense(
            (config.patch_size**2 * 3,),
            ("embed", None),
            precision=self.precision,
            name="pred",
            linear_init=TORCH_DEFAULT,
        )(x)
        logits = self.precision.to_float32("output", logits)
        return DecoderOutput(logits, unpatchify(logits, config.patch_size, 3))

    def _add_positions(self, x: Array) -> Array:
        """Prepends the class token to [B, N, D] and adds the position table."""
        axes = (None, "tokens", "embed")
        width = x.shape[-1]
        token = add_param(self, "cls_token", zeros, axes, (1, 1, width))
        table = add_param(self, "pos_embed", _positions, axes, (1, 1 + x.shape[1], width))
        front = jnp.broadcast_to(token, (len(x), 1, width))
        return self.precision.to_residual(jnp.concatenate([front, x], axis=1) + table)

    def _check(self, tokens: Array, drop_first: bool) -> int:
        """Returns the side of the tokens' grid."""
        count, channels = tokens.shape[1] - int(drop_first), tokens.shape[2]
        if channels != self.config.latent_channels:
            raise ConfigError(
                f"latents of {channels} channels for a decoder of {self.config.latent_channels}",
                "use the decoder that was trained for this encoder",
            )
        side = int(np.sqrt(count))
        if side * side != count:
            raise ConfigError(
                f"{count} latent tokens do not form a square grid",
                "pass the patch tokens only; drop_first drops a class token",
            )
        return side


def _positions(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
    """Returns sines and cosines, and zeros for the class token [1, 1+N, D]."""
    del key
    table = sincos_2d(shape[-1], int(np.sqrt(shape[1] - 1)))
    return jnp.asarray(np.pad(table, ((1, 0), (0, 0))), dtype)[None]
