"""LPIPS: perceptual distance of two images by the features of a frozen VGG16.

Source: Zhang et al. 2018, taming-transformers lpips.py, as RAE's stage 1 uses it; spec encoder 10.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from dsr_jax.core.typing import Array
from dsr_jax.models.layers import add_param, ones

CONVOLUTIONS = (2, 2, 3, 3, 3)
"""Convolutions of VGG16's five slices; all but the first slice begin with a max-pool."""

_SHIFT = np.array((-0.030, -0.088, -0.188), np.float32)
_SCALE = np.array((0.458, 0.448, 0.450), np.float32)
_EPS = 1e-10


class LPIPS(nn.Module):
    """Distance of images by VGG16's features, each channel weighted by a learned factor.

    Attributes:
      channels: Widths of the five slices; VGG16 has 64, 128, 256, 512, 512.
    """

    channels: tuple[int, ...]

    @nn.compact
    def __call__(self, a: Array, b: Array) -> Array:
        """Compares images [B, H, W, 3] in [-1, 1] pair by pair; returns distances [B], float32."""
        batch = len(a)
        x = (jnp.concatenate([a, b]) - _SHIFT) / _SCALE
        total = jnp.zeros(batch)
        for number, (width, count) in enumerate(
            zip(self.channels, CONVOLUTIONS, strict=True), start=1
        ):
            if number > 1:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for index in range(1, count + 1):
                name = f"conv{number}_{index}"
                x = nn.relu(nn.Conv(width, (3, 3), padding=1, name=name)(x))
            features = _unit(x)
            difference = jnp.square(features[:batch] - features[batch:])
            weight = add_param(self, f"weight{number}", ones, (None,) * 4, (1, width, 1, 1))
            total += jnp.mean(difference @ weight.reshape(-1), axis=(1, 2))
        return total


def _unit(x: Array) -> Array:
    """Scales the channels of [B, H, W, C] to norm 1.

    The gradient at zero is zero; the original's is NaN.
    """
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    positive = squares > 0
    norm = jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)
    return x / (norm + _EPS)
