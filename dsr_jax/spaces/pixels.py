"""Pixel space: latents are the images themselves, from -1 to 1."""

from dataclasses import dataclass

import jax.numpy as jnp

from dsr_jax.core.typing import Array, PyTree


@dataclass(frozen=True)
class PixelSpace:
    """An `InputSpace` without networks.

    Attributes:
      image_size: Side of the square images.
      channels: 1 for gray, 3 for RGB.
    """

    image_size: int
    channels: int

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one image."""
        return (self.image_size, self.image_size, self.channels)

    def encode(self, variables: PyTree, images: Array, keys: Array | None = None) -> Array:
        """Maps [0, 1] to [-1, 1]."""
        del variables, keys
        return images * 2 - 1

    def decode(self, variables: PyTree, latents: Array) -> Array:
        """Maps [-1, 1] to [0, 1] and clips."""
        del variables
        return jnp.clip((latents + 1) / 2, 0, 1)
