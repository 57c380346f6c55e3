"""Input spaces: map images to a denoiser's latents and back."""

from dsr_jax.spaces.base import InputSpace
from dsr_jax.spaces.pixels import PixelSpace
from dsr_jax.spaces.rae import RAE
from dsr_jax.spaces.vae import VAE

__all__ = ["RAE", "VAE", "InputSpace", "PixelSpace"]
