"""The discriminator of stage 1: trained heads on the features of a frozen DINO ViT.

Source: StyleGAN-T's and VAR's projected discriminator, RAE stage1/disc; spec encoder 9.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array, Params, PyTree
from dsr_jax.models.layers import TORCH_DEFAULT, add_param, flattened, ones, zeros
from dsr_jax.models.resample import resample
from dsr_jax.models.vit import ViT

SPECTRAL = "spectral"
"""Flax collection of the singular vectors, which are state and not parameters."""

_EPS = 1e-12


class SpectralConv(nn.Module):
    """A convolution over tokens whose kernel is divided by its largest singular value.

    The value is estimated from vectors in the collection "spectral". If that collection is mutable,
    as in training, one power iteration updates them first. Kernel [k, in, out]; the vectors are
    those of the original's matrix [out, in * k], in its order. `nn.SpectralNorm` cannot be used: it
    keeps u and sigma of the matrix [k * in, out], and published heads hold u and v.

    Source: torch.nn.utils.spectral_norm.

    Attributes:
      features: Channels of the output.
      kernel_size: Odd number k of tokens; the sequence is padded circularly.
    """

    features: int
    kernel_size: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [B, T, D] to [B, T, features]."""
        width, size = x.shape[-1], self.kernel_size
        fan_in = width * size
        shape = (size, width, self.features)
        init = flattened(TORCH_DEFAULT.kernel(fan_in), 2)
        kernel = add_param(self, "kernel", init, (None, "embed", None), shape)
        bias = add_param(self, "bias", TORCH_DEFAULT.bias(fan_in), (None,), (self.features,))
        kernel = kernel / self._largest(kernel.transpose(2, 1, 0).reshape(self.features, fan_in))
        around = ((0, 0), (size // 2, size // 2), (0, 0))
        x = jnp.pad(x, around, mode="wrap")
        y = jax.lax.conv_general_dilated(
            x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return y + bias

    def _largest(self, matrix: Array) -> Array:
        """Estimates the largest singular value; gradients flow through the matrix only."""

        def init(size: int) -> Array:
            return _normalize(jax.random.normal(self.make_rng("params"), (size,)))

        u = self.variable(SPECTRAL, "u", init, matrix.shape[0])
        v = self.variable(SPECTRAL, "v", init, matrix.shape[1])
        if self.is_mutable_collection(SPECTRAL) and not self.is_initializing():
            fixed = jax.lax.stop_gradient(matrix)
            v.value = _normalize(fixed.T @ u.value)
            u.value = _normalize(fixed @ v.value)
        return u.value @ matrix @ v.value


def _normalize(x: Array) -> Array:
    return x / jnp.maximum(jnp.linalg.norm(x), _EPS)


class TokenNorm(nn.Module):
    """Normalizes each channel of each sample over its tokens; learned scale and bias.

    Attributes:
      epsilon: Added to the variance.
    """

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [B, T, D] to [B, T, D]."""
        centered = x - jnp.mean(x, axis=1, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=1, keepdims=True)
        scale = add_param(self, "scale", ones, ("embed",), x.shape[-1:])
        bias = add_param(self, "bias", zeros, ("embed",), x.shape[-1:])
        return centered * jax.lax.rsqrt(variance + self.epsilon) * scale + bias


class Head(nn.Module):
    """Classifies every token of one feature map as real or generated.

    Attributes:
      kernel_size: Kernel size of the middle convolution, in tokens.
    """

    kernel_size: int = 9

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps features [B, T, D] to logits [B, T]."""
        x = self._block(x, 1, "first")
        x = (x + self._block(x, self.kernel_size, "second")) / np.sqrt(2)
        return SpectralConv(1, name="out")(x)[..., 0]

    def _block(self, x: Array, size: int, name: str) -> Array:
        x = SpectralConv(x.shape[-1], size, name=name)(x)
        return nn.leaky_relu(TokenNorm(name=f"{name}_norm")(x), 0.2)


class Heads(nn.Module):
    """One head per feature map; parameters and singular vectors have a leading axis of maps.

    Attributes:
      kernel_size: Kernel size of each middle convolution, in tokens.
    """

    kernel_size: int = 9

    @nn.compact
    def __call__(self, features: Array) -> Array:
        """Maps features [M, B, T, D] to logits [B, M * T], map by map."""
        heads = nn.vmap(
            Head,
            variable_axes={"params": 0, SPECTRAL: 0},
            split_rngs={"params": True},
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.kernel_size, name="heads")
        logits = heads(features)
        return jnp.moveaxis(logits, 0, 1).reshape(logits.shape[1], -1)


@dataclass(frozen=True)
class Discriminator:
    """Frozen backbone and trained heads; holds no arrays.

    Attributes:
      backbone: DINO's ViT.
      key_depths: Blocks whose outputs are classified, besides the last one's.
      heads: The trained part.
    """

    backbone: ViT
    key_depths: tuple[int, ...] = (2, 5, 8, 11)
    heads: Heads = Heads()

    @property
    def _depths(self) -> list[int]:
        """Indices of the last block and of the key blocks that exist; one may occur twice."""
        depth = self.backbone.config.depth
        return [depth - 1, *(key for key in self.key_depths if key < depth)]

    def init(self, key: Array) -> tuple[PyTree, PyTree]:
        """Returns the heads' initial parameters, in Flax's boxes, and singular vectors."""
        config = self.backbone.config
        tokens = (config.image_size // config.patch_size) ** 2
        features = jnp.zeros((len(self._depths), 1, tokens, config.hidden_size))
        variables: Any = self.heads.init(key, features)
        return variables["params"], variables[SPECTRAL]

    def features(self, backbone: Params, images: Array) -> Array:
        """Maps images [B, H, W, 3] in [-1, 1] to patch features [M, B, T, D]."""
        config = self.backbone.config
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ConfigError(
                f"images of shape {images.shape} are not RGB",
                "the discriminator takes RGB images [B, H, W, 3]",
            )
        x = resample(images, config.image_size, config.image_size, "bilinear")
        mean, std = (np.array(x, np.float32) for x in (config.pixel_mean, config.pixel_std))
        _, kept = self.backbone.apply(
            {"params": backbone}, ((x + 1) / 2 - mean) / std, mutable=["intermediates"]
        )
        outputs = kept["intermediates"]["blocks"]["block_out"][0]
        return outputs[np.array(self._depths), :, config.num_prefix :]

    def __call__(
        self, backbone: Params, heads: Params, spectral: PyTree, images: Array, *, train: bool
    ) -> tuple[Array, PyTree]:
        """Returns logits of images [B, H, W, 3] in [-1, 1].

        Args:
          backbone: Frozen parameters.
          heads: Trained parameters.
          spectral: The heads' singular vectors.
          images: The images.
          train: Updates the singular vectors by one power iteration first.

        Returns:
          Logits [B, M * T], large for real images, and the singular vectors afterwards.
        """
        features = self.features(backbone, images)
        variables = {"params": heads, SPECTRAL: spectral}
        if not train:
            logits: Any = self.heads.apply(variables, features)
            return logits, spectral
        logits, after = self.heads.apply(variables, features, mutable=[SPECTRAL])
        return logits, after[SPECTRAL]
