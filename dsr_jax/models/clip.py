"""CLIP: embeddings of images and of texts that can be compared, for CLIPScore.

Source: Radford et al. 2021; transformers modeling_clip.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsr_jax.core.typing import Array

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclass(frozen=True)
class TowerSizes:
    """Sizes of one of both transformers.

    Attributes:
      hidden_size: Width D.
      depth: Blocks.
      num_heads: Attention heads.
      mlp_dim: Hidden MLP units.
      activation: A name in ACTIVATIONS.
    """

    hidden_size: int
    depth: int
    num_heads: int
    mlp_dim: int
    activation: str = "quick_gelu"


class ClipTower(nn.Module):
    """Pre-norm transformer blocks."""

    sizes: TowerSizes
    causal: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps tokens [B, S, D] to [B, S, D]."""
        sizes = self.sizes
        for number in range(sizes.depth):
            x = ClipBlock(sizes, self.causal, name=f"block{number}")(x)
        return x


class ClipBlock(nn.Module):
    """Attention and MLP, each added to the stream."""

    sizes: TowerSizes
    causal: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps tokens [B, S, D] to [B, S, D]."""
        sizes = self.sizes
        shape = (*x.shape[:2], sizes.num_heads, sizes.hidden_size // sizes.num_heads)
        y = nn.LayerNorm(1e-5, name="norm1")(x)
        q, k, v = (
            nn.Dense(sizes.hidden_size, name=name)(y).reshape(shape) for name in ("q", "k", "v")
        )
        y = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal).reshape(x.shape)
        x = x + nn.Dense(sizes.hidden_size, name="out")(y)
        y = nn.Dense(sizes.mlp_dim, name="fc1")(nn.LayerNorm(1e-5, name="norm2")(x))
        return x + nn.Dense(sizes.hidden_size, name="fc2")(ACTIVATIONS[sizes.activation](y))


class Clip(nn.Module):
    """Both towers with their projections to the common space.

    Attributes:
      vision: Sizes of the image tower.
      text: Sizes of the text tower.
      image_size: Side of the images in pixels.
      patch_size: Side of a patch.
      vocab_size: Token ids.
      text_length: Tokens of a text.
      end_id: Token at whose first occurrence a text is read off.
      width: Width of the embeddings.
    """

    vision: TowerSizes
    text: TowerSizes
    image_size: int
    patch_size: int
    vocab_size: int
    text_length: int
    end_id: int
    width: int

    @nn.compact
    def __call__(self, images: Array, tokens: Array) -> tuple[Array, Array]:
        """Embeds images and texts; the norms are not 1.

        Args:
          images: [B, H, W, 3], normalized by CLIP's mean and standard deviation.
          tokens: Token ids [N, text_length], int32.

        Returns:
          [B, width] and [N, width], float32.
        """
        size, normal = self.vision.hidden_size, nn.initializers.normal(0.02)
        patches = nn.Conv(
            size, (self.patch_size,) * 2, self.patch_size, "VALID", use_bias=False, name="patch"
        )(images)
        x = patches.reshape(len(images), -1, size)
        front = self.param("class_token", normal, (size,))
        x = jnp.concatenate([jnp.broadcast_to(front, (len(x), 1, size)), x], axis=1)
        x = x + self.param("image_positions", normal, x.shape[1:])
        x = ClipTower(self.vision, name="vision")(nn.LayerNorm(1e-5, name="vision_pre_norm")(x))
        x = nn.LayerNorm(1e-5, name="vision_norm")(x[:, 0])

        y = nn.Embed(self.vocab_size, self.text.hidden_size, name="words")(tokens)
        y = y + self.param("text_positions", normal, y.shape[1:])
        y = ClipTower(self.text, causal=True, name="text_tower")(y)
        y = nn.LayerNorm(1e-5, name="text_norm")(y)
        ends = jnp.argmax(tokens == self.end_id, axis=1)
        y = jnp.take_along_axis(y, ends[:, None, None], axis=1)[:, 0]
        return (
            nn.Dense(self.width, use_bias=False, name="vision_projection")(x),
            nn.Dense(self.width, use_bias=False, name="text_projection")(y),
        )
