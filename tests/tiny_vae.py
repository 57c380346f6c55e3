"""A tiny random VAE in a converted folder, for other tests."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from dsr_jax.convert.sdvae import SDVAE, save_vae
from dsr_jax.models.latent_normalization import LatentNormalization
from dsr_jax.models.vae import AutoencoderKL, VAEConfig
from tests.tiny_rae import random_params

CONFIG = VAEConfig(widths=(8, 12), layers_per_block=1, num_groups=4)


def vae_params(config: VAEConfig = CONFIG, seed: int = 0) -> Any:
    """Random parameters."""
    image = jnp.zeros((1, config.factor, config.factor, config.image_channels))
    return random_params(AutoencoderKL(config), image, seed)


def save_tiny_vae(folder: Path, scale: float = 0.18215) -> tuple[str, ...]:
    """Writes the converted folder; returns the overrides that name it."""
    save_vae(folder, SDVAE(CONFIG, vae_params(), LatentNormalization(scale)), {"source": "random"})
    return (
        "--config.space.name=vae",
        f"--config.space.vae={folder}",
        "--config.data.channels=3",
        "--config.eval.classifier=",
    )
