"""Builds the VAE that `config.space` names, with its frozen parameters."""

import jax
from jax.sharding import Mesh

from dsr_jax.build.rae import check_images
from dsr_jax.config import ConfigDict
from dsr_jax.convert.sdvae import load_vae
from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import PyTree
from dsr_jax.models.latent_normalization import LatentNormalization
from dsr_jax.models.precision import Precision
from dsr_jax.models.vae import AutoencoderKL, VAEConfig
from dsr_jax.parallel.shardings import replicated
from dsr_jax.spaces import VAE


def make_vae(config: ConfigDict, mesh: Mesh | None = None) -> tuple[VAE, PyTree]:
    """Reads the autoencoder.

    Args:
      config: The whole config.
      mesh: Mesh over which the parameters are replicated; None leaves them in host memory.

    Raises:
      ConversionError: If the folder is missing, damaged or of another kind.
      ConfigError: If it does not fit the config.
    """
    check_images(config, "vae", "python -m dsr_jax.convert sdvae wrote")
    found = load_vae(config.space.vae)
    for name in ("scale", "shift"):
        asked, made_for = config.space[name], getattr(found.normalization, name)
        if asked != made_for:
            raise ConfigError(
                f"config.space.{name}={asked}, but the autoencoder in {config.space.vae} was made "
                f"for {made_for}",
                f"set config.space.{name}={made_for}",
            )
    space = vae_space(config, found.config, found.normalization)
    variables = space.make_variables(found.params)
    return space, variables if mesh is None else jax.device_put(variables, replicated(mesh))


def vae_space(
    config: ConfigDict, sizes: VAEConfig, normalization: LatentNormalization | None = None
) -> VAE:
    """Returns the space of an autoencoder of these sizes, without its parameters.

    Args:
      config: The whole config.
      sizes: Sizes of the autoencoder.
      normalization: Normalization of its latents; None for the config's scale and shift alone.
    """
    if normalization is None:
        normalization = LatentNormalization(config.space.scale, config.space.shift)
    network = AutoencoderKL(sizes, precision=Precision(config.precision.compute))
    return VAE(network, config.data.image_size, normalization)
