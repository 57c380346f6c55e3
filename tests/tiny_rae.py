"""A tiny random autoencoder in converted folders, for other tests."""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.convert.decoder import save_decoder
from dsr_jax.convert.files import save_converted
from dsr_jax.convert.statistics import save_statistics
from dsr_jax.models.decoder import DecoderConfig, ViTDecoder
from dsr_jax.models.vit import ViT, ViTConfig

GRID = 4
ENCODER = ViTConfig(
    family="siglip",
    image_size=16,
    patch_size=4,
    hidden_size=16,
    depth=2,
    num_heads=2,
    mlp_dim=24,
    activation="gelu_tanh",
)
DECODER = DecoderConfig(
    latent_channels=16, grid=GRID, patch_size=5, hidden_size=12, depth=2, num_heads=2, mlp_dim=20
)


def random_params(module: nn.Module, sample: jax.Array, seed: int = 0) -> Any:
    """Parameters [...] of numbers that make a mistake in any of them show."""
    abstract = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), sample))["params"]
    random = np.random.default_rng(seed)

    def random_leaf(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return (0.3 * random.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree.map(random_leaf, abstract)


def encoder_params(config: ViTConfig = ENCODER) -> Any:
    """Random parameters of an encoder."""
    side = config.patch_size
    return random_params(ViT(config), jnp.zeros((1, side, side, 3)))


def decoder_params(config: DecoderConfig = DECODER) -> Any:
    """Random parameters of a decoder."""
    tokens = jnp.zeros((1, config.grid**2, config.latent_channels))
    return random_params(ViTDecoder(config), tokens, seed=1)


def statistics() -> dict[str, np.ndarray]:
    """Mean and variance of latents [h, w, C]."""
    random = np.random.default_rng(2)
    shape = (GRID, GRID, ENCODER.hidden_size)
    return {
        "mean": random.standard_normal(shape).astype(np.float32),
        "var": random.uniform(0.5, 2, shape).astype(np.float32),
    }


def save_rae(folder: Path) -> tuple[str, ...]:
    """Writes encoder, decoder and statistics; returns the overrides that name them."""
    record = {"family": "siglip2", "model": dataclasses.asdict(ENCODER), "source": "random"}
    save_converted(folder / "encoder", encoder_params(), record)
    save_decoder(folder / "decoder", DECODER, decoder_params(), {"source": "random"})
    save_statistics(folder / "statistics.safetensors", statistics())
    return (
        "--config.space.name=rae",
        f"--config.space.encoder={folder / 'encoder'}",
        f"--config.space.decoder={folder / 'decoder'}",
        f"--config.space.statistics={folder / 'statistics.safetensors'}",
        f"--config.space.image_size={GRID * ENCODER.patch_size}",
        "--config.data.channels=3",
        "--config.eval.classifier=",
    )
