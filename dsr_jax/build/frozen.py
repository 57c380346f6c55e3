"""Opens the frozen networks that a config names: converted folders, or random weights."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsr_jax.convert.decoder import load_decoder
from dsr_jax.convert.files import load_converted, read_conversion
from dsr_jax.convert.hub import load_encoder
from dsr_jax.convert.lpips import load_lpips
from dsr_jax.core.errors import ConfigError
from dsr_jax.core.plugins import is_reference, load_object
from dsr_jax.core.rng import stream_key
from dsr_jax.core.typing import Array, Params
from dsr_jax.models.decoder import DecoderConfig, ViTDecoder
from dsr_jax.models.encoder import Encoder, check_encoder
from dsr_jax.models.lpips import LPIPS
from dsr_jax.models.precision import Precision
from dsr_jax.models.variants import (
    RANDOM_DECODERS,
    RANDOM_ENCODERS,
    RANDOM_LPIPS,
    RANDOM_PREFIX,
)
from dsr_jax.models.vit import ViT, ViTConfig
from dsr_jax.parallel.processes import log


def open_vit(
    key: str,
    name: str,
    known: Mapping[str, Mapping[str, Any]],
    load: Callable[[str], tuple[ViTConfig, Params]],
    seed: int,
) -> tuple[ViTConfig, Params]:
    """Returns sizes and parameters of a frozen ViT.

    Args:
      key: The config's key, for messages and as the name of the random stream.
      name: Value of the key: a converted folder, or "random:NAME".
      known: Sizes by NAME.
      load: Reads a folder.
      seed: Seed of random weights.

    Raises:
      ConversionError: If the folder holds no such network.
      ConfigError: If there is no NAME.
    """
    if not name.startswith(RANDOM_PREFIX):
        return load(name)
    config = ViTConfig(**_preset(key, name, known))
    images = jnp.zeros((1, config.patch_size, config.patch_size, 3))
    return config, _random_params(key, ViT(config), seed, images)


def open_encoder(key: str, name: str, seed: int, precision: Precision) -> tuple[Encoder, Params]:
    """Returns a frozen encoder and its parameters.

    Args:
      key: The config's key, for messages and as the name of the random stream.
      name: Value of the key: a converted folder, "random:NAME" with a NAME of
        `models.variants.RANDOM_ENCODERS`, or "random:package.module:Class".
      seed: Seed of random weights.
      precision: Dtype policy.

    Raises:
      ConversionError: If the folder holds no encoder.
      ConfigError: If there is no such encoder, or it lacks a member of `models.encoder.Encoder`.
    """
    preset = name.removeprefix(RANDOM_PREFIX)
    if name.startswith(RANDOM_PREFIX) and is_reference(preset):
        encoder = _outside_encoder(key, preset, {}, precision)
        images = jnp.zeros((1, encoder.patch_size, encoder.patch_size, 3))
        return encoder, _random_params(key, encoder, seed, images)
    record_file = Path(name) / "conversion.json"
    if record_file.is_file() and is_reference(str(read_conversion(name).get("family"))):
        params, record = load_converted(name)
        return _outside_encoder(key, record["family"], record["model"], precision), params
    config, vit_params = open_vit(key, name, RANDOM_ENCODERS, load_encoder, seed)
    return ViT(config, precision=precision), vit_params


def _outside_encoder(
    key: str, reference: str, sizes: Mapping[str, Any], precision: Precision
) -> Any:
    """Returns the encoder of a class outside the package, with the config's precision."""
    kind = load_object(key, reference)
    tuples = {key: tuple(x) if isinstance(x, list) else x for key, x in sizes.items()}
    fields = getattr(kind, "__dataclass_fields__", {})
    given: dict[str, Any] = {"precision": precision} if "precision" in fields else {}
    encoder = kind(**tuples, **given)
    check_encoder(encoder, f"{key}={reference!r}")
    return encoder


def open_decoder(
    key: str, name: str, channels: int, grid: int, image_size: int, seed: int
) -> tuple[DecoderConfig, Params]:
    """Returns sizes and parameters of a frozen decoder.

    Args:
      key: The config's key, for messages and as the name of the random stream.
      name: Value of the key: a converted folder, or "random:NAME".
      channels: Channels C of the latents.
      grid: Side of the latents, for random ones.
      image_size: Side of the images, for random ones.
      seed: Seed of random weights.

    Raises:
      ConversionError: If the folder holds no decoder.
      ConfigError: If there is no NAME.
    """
    if not name.startswith(RANDOM_PREFIX):
        return load_decoder(name)
    sizes = _preset(key, name, RANDOM_DECODERS)
    config = DecoderConfig(channels, grid, image_size // grid, **sizes)
    tokens = jnp.zeros((1, grid**2, channels))
    return config, _random_params(key, ViTDecoder(config), seed, tokens)


def open_lpips(key: str, name: str, seed: int) -> tuple[LPIPS, Params]:
    """Returns LPIPS and its parameters; arguments and errors as those of `open_vit`."""
    if not name.startswith(RANDOM_PREFIX):
        return load_lpips(name)
    network = LPIPS(_preset(key, name, RANDOM_LPIPS))
    images = jnp.zeros((1, 16, 16, 3))
    return network, _random_params(key, network, seed, images, images)


def _preset(key: str, name: str, known: Mapping[str, Any]) -> Any:
    preset = name.removeprefix(RANDOM_PREFIX)
    if preset not in known:
        choices = ", ".join(f"{RANDOM_PREFIX}{name}" for name in known)
        raise ConfigError(
            f"{key}={name!r} does not exist", f"name a converted folder, or one of {choices}"
        )
    return known[preset]


def _random_params(key: str, network: Any, seed: int, *inputs: Array) -> Params:
    log(f"{key}: random weights, for smoke runs only")

    @jax.jit
    def init(stream: Array) -> Any:
        return nn.unbox(network.init(stream, *inputs))["params"]

    return init(stream_key(seed, key))
