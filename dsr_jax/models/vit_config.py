"""Sizes and flags of the Vision Transformers that serve as frozen encoders and backbones."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array
from dsr_jax.models.layers import TORCH_DEFAULT, XAVIER, LinearInit

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}


@dataclass(frozen=True)
class ViTConfig:
    """Sizes and flags of an encoder.

    Attributes:
      family: "siglip", "dinov2", "dinov3" or "mae": the family of its checkpoints.
      image_size: Side of the images that the position table was made for, in pixels.
      patch_size: Side P of a patch.
      hidden_size: Width D.
      depth: Blocks L.
      num_heads: Attention heads H.
      mlp_dim: Hidden MLP units M.
      layer_norm_eps: Epsilon of every norm, the final one included.
      activation: "gelu" (exact), "gelu_tanh" or "silu".
      use_cls: Prepends a class token, whose output is dropped.
      num_registers: Trained registers after the class token; their outputs are dropped.
      use_layer_scale: Learned factors on both branches of a block.
      query_bias: The query projection has a bias.
      key_bias: The key projection has one.
      value_bias: The value projection has one.
      gated_mlp: `fc2(act(gate(x)) * fc1(x))`.
      position_resampling: Method of `resample` for the position table; "" for no table.
      rope_theta: Base of the rotary position of patches; 0 for none.
      class_output: Returns the class token after the final norm with its affine parameters.
      torch_init: Initializes projections like PyTorch, for blocks that are trained.
      pixel_mean: Mean of each channel that images are normalized by, for values in [0, 1].
      pixel_std: Standard deviation of each channel that images are normalized by.
    """

    family: str
    image_size: int
    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_dim: int
    layer_norm_eps: float = 1e-6
    activation: str = "gelu"
    use_cls: bool = False
    num_registers: int = 0
    use_layer_scale: bool = False
    query_bias: bool = True
    key_bias: bool = True
    value_bias: bool = True
    gated_mlp: bool = False
    position_resampling: str = "bicubic"
    rope_theta: float = 0.0
    class_output: bool = False
    torch_init: bool = False
    pixel_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}"
            )
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"activation={self.activation!r} is unknown",
                f"choose from {', '.join(ACTIVATIONS)}",
            )

    @property
    def linear_init(self) -> LinearInit:
        """Initialization of the projections."""
        return TORCH_DEFAULT if self.torch_init else XAVIER

    @property
    def num_prefix(self) -> int:
        """Number of tokens before the patches: class token and trained registers."""
        return self.use_cls + self.num_registers
