"""The affine map between an autoencoder's latents and those of a denoiser."""

from dataclasses import dataclass

import numpy as np

from dsr_jax.core.typing import Array


@dataclass(frozen=True)
class LatentNormalization:
    """The affine map between an autoencoder's latents and those that a denoiser is trained on.

    Source: diffusers (scaling_factor, shift_factor, latents_mean, latents_std).

    Attributes:
      scale: Factor; the default is that of the SD-VAE.
      shift: Taken from latents before the factor.
      mean: Mean of each channel, subtracted from latents before scaling; () for none.
      std: Standard deviation of each channel, by which latents are divided; () for none.
    """

    scale: float = 0.18215
    shift: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def normalize(self, latents: Array) -> Array:
        """Maps the autoencoder's latents [B, h, w, C] to the denoiser's."""
        offset, factor = self._affine()
        return (latents - offset) * factor

    def denormalize(self, latents: Array) -> Array:
        """Maps the denoiser's latents [B, h, w, C] to the autoencoder's."""
        offset, factor = self._affine()
        return latents / factor + offset

    def _affine(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns what is subtracted and the factor that follows, float32, a number or [C]."""
        offset = np.asarray(self.mean or self.shift, np.float32)
        std = np.asarray(self.std or 1.0, np.float64)
        return offset, np.asarray(self.scale / std, np.float32)
