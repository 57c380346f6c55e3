"""Input spaces: what a denoiser's latents are, and how images go in and come out."""

from dsr_jax.spaces.base import InputSpace
from dsr_jax.spaces.pixels import PixelSpace

__all__ = ["InputSpace", "PixelSpace"]
