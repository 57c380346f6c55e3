"""Shared parts of the configs of the paper's experiments; each sets keys of a config in place.

Source: paper, section "experiments"; spec denoiser 8 and encoder 3.
"""

from collections.abc import Mapping
from types import MappingProxyType

from ml_collections import ConfigDict

from dsr_jax.models.variants import RANDOM_PREFIX
from dsr_jax.registers.neurons import PUBLISHED

IMAGENET_EPOCH = 1_251
"""Steps per epoch: batches of 1024, 128 in each of eight processes that drop their last one."""

RAE_ENCODERS: Mapping[str, str] = MappingProxyType(
    {
        "siglip2-base": "siglip2-base-patch16-256",
        "siglip2-so400m": "siglip2-so400m-patch14-224",
        "dinov2-base": "dinov2-base",
        "dinov2-with-registers-base": "dinov2-with-registers-base",
    }
)
"""Encoders of the experiments, by the names of their folders: names in `variants.ENCODERS`."""


def use_imagenet(config: ConfigDict, global_batch: int) -> None:
    """Trains on ImageNet at 256 x 256 pixels."""
    config.data.update(
        source="folder",
        image_size=256,
        channels=3,
        num_classes=1000,
        global_batch=global_batch,
        workers=8,
    )


def use_rae(config: ConfigDict, encoder: str, test_time_registers: bool) -> None:
    """Trains in the latents of a representation autoencoder, as DSR does on ImageNet.

    File names are those of the configs' docstrings. As in DSR, the time shift is that of 196608
    numbers for each encoder, although So400M's latents are larger.

    Args:
      config: Experiment config.
      encoder: A name in RAE_ENCODERS.
      test_time_registers: Uses the published register neurons, if there are any. Latents then
        have other statistics, but the same decoder.
    """
    preset = RAE_ENCODERS[encoder]
    neurons = preset if test_time_registers and preset in PUBLISHED else ""
    config.space.update(
        name="rae",
        encoder=f"converted/{encoder}",
        decoder=f"converted/{encoder}-decoder",
        statistics=f"converted/{encoder}{'-ttr' if neurons else ''}-statistics.safetensors",
        neurons=neurons,
    )
    config.objective.time_shift = (196_608 / 4_096) ** 0.5
    config.precision.matmul = "tensorfloat32"


def use_epochs(config: ConfigDict, epochs: int) -> None:
    """Trains for a number of ImageNet epochs; keeps a checkpoint of every twentieth."""
    config.train.steps = epochs * IMAGENET_EPOCH
    config.checkpoint.every_steps = 4 * IMAGENET_EPOCH
    config.checkpoint.keep_every = 20 * IMAGENET_EPOCH


def run_locally(config: ConfigDict) -> None:
    """Shrinks the run, but not the network, to a few steps on scikit-learn's digits."""
    config.data.update(
        source="digits",
        image_size=8,
        channels=1,
        num_classes=10,
        global_batch=16,
        flip=False,
        workers=0,
    )
    config.train.steps = 8
    config.checkpoint.every_steps = 4
    config.log.every_steps = 2
    config.sample.update(num_points=4, num=10, batch=16, every_steps=8)


def use_tiny_rae(config: ConfigDict) -> None:
    """Uses an autoencoder of tiny random networks on images of 32 pixels."""
    tiny = f"{RANDOM_PREFIX}tiny"
    config.space.update(encoder=tiny, decoder=tiny, statistics="", neurons="", image_size=32)
    config.data.update(image_size=32, channels=3)
