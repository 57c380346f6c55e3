"""Input spaces: what a denoiser's latents are, and how images go in and come out."""

from dsr_jax.spaces.base import InputSpace
from dsr_jax.spaces.pixels import PixelSpace
from dsr_jax.spaces.rae import RAE

__all__ = ["RAE", "InputSpace", "PixelSpace"]
