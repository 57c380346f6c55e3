"""A VAE as input space: latents are samples of its posterior, normalized to about unit variance.

Source: SiT train.py and sample_ddp.py; spec denoiser 10.3.
"""

from dataclasses import dataclass
from typing import Any

import jax

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.rng import normal_per_sample
from dsr_jax.core.typing import Array, Params, PyTree
from dsr_jax.models.latent_normalization import LatentNormalization
from dsr_jax.models.vae import AutoencoderKL, Posterior


@dataclass(frozen=True)
class VAE:
    """An `InputSpace` of a frozen variational autoencoder.

    Attributes:
      network: Encoder and decoder.
      image_size: Side of the images.
      normalization: Between its latents and those of the space.
    """

    network: AutoencoderKL
    image_size: int
    normalization: LatentNormalization = LatentNormalization()

    def __post_init__(self) -> None:
        factor = self.network.config.factor
        if self.image_size <= 0 or self.image_size % factor:
            raise ConfigError(
                f"config.data.image_size={self.image_size} for an autoencoder that divides sides "
                f"by {factor}",
                f"use a multiple of {factor}",
            )
        if not self.normalization.scale > 0:
            raise ConfigError(
                f"config.space.scale={self.normalization.scale} is not positive",
                "use the factor that the autoencoder was made for",
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one latent."""
        config = self.network.config
        side = self.image_size // config.factor
        return (side, side, config.latent_channels)

    def make_variables(self, params: Params) -> dict[str, Any]:
        """Returns what `encode` and `decode` take, from the network's parameters."""
        return {"vae": params}

    def posterior(self, variables: PyTree, images: Array) -> Posterior:
        """Maps images [B, H, W, 3], float in [0, 1], to a Gaussian over the VAE's latents."""
        posterior: Any = self.network.apply(
            {"params": variables["vae"]}, images * 2 - 1, method="encode"
        )
        return posterior

    def encode(self, variables: PyTree, images: Array, keys: Array | None = None) -> Array:
        """Maps images [B, H, W, 3], float in [0, 1], to latents [B, h, w, C], float32.

        Args:
          variables: Result of `make_variables`.
          images: The batch.
          keys: One per sample [B], to sample the posterior; None takes its mean.
        """
        posterior = self.posterior(variables, images)
        latents = posterior.mean
        if keys is not None:
            latents = posterior.sample(normal_per_sample(keys, self.latent_shape))
        return jax.lax.stop_gradient(self.normalization.normalize(latents))

    def decode(self, variables: PyTree, latents: Array) -> Array:
        """Maps latents [B, h, w, C] to images [B, H, W, 3], not clipped to [0, 1]."""
        images: Any = self.network.apply(
            {"params": variables["vae"]}, self.normalization.denormalize(latents), method="decode"
        )
        return (images + 1) / 2
