"""Builds the representation autoencoder that `config.space` names, with its frozen arrays."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dsr_jax.build.frozen import open_decoder, open_encoder
from dsr_jax.config import ConfigDict, trains_decoder
from dsr_jax.convert.statistics import load_statistics
from dsr_jax.core.errors import ConfigError
from dsr_jax.core.files import file_digest
from dsr_jax.core.typing import PyTree
from dsr_jax.data.latents import read_manifest
from dsr_jax.models.decoder import ViTDecoder
from dsr_jax.models.encoder import Encoder, neurons_shape
from dsr_jax.models.intervention import Intervention
from dsr_jax.models.precision import Precision
from dsr_jax.parallel.axes import Constrain, make_rules
from dsr_jax.parallel.shardings import replicated
from dsr_jax.registers.neurons import load_neurons, neurons_to_mask
from dsr_jax.spaces import RAE

PATCHES = 16
"""Default number of patches along one side of the encoder's input."""

FILES = ("encoder", "decoder", "statistics", "neurons", "vae")
"""Keys of `config.space` that name files."""


def make_rae(config: ConfigDict, mesh: Mesh | None = None) -> tuple[RAE, PyTree]:
    """Reads the encoder, and decoder, statistics and neurons if the config names them.

    Args:
      config: The whole config.
      mesh: Mesh over which the arrays are replicated; None leaves them in host memory.

    Raises:
      ConversionError: If a folder or file is missing, damaged or of the wrong kind.
      ConfigError: If they do not fit each other, or the config.
    """
    check_images(config, "encoder", "python -m dsr_jax.convert wrote of an encoder")
    section, precision = config.space, Precision(config.precision.compute)
    encoder, encoder_params = open_encoder(
        "config.space.encoder", section.encoder, config.seed, precision
    )
    image_size = section.image_size or PATCHES * encoder.patch_size
    decoder = decoder_params = None
    if section.decoder:
        decoder_sizes, decoder_params = open_decoder(
            "config.space.decoder",
            section.decoder,
            encoder.hidden_size,
            image_size // encoder.patch_size,
            config.data.image_size,
            config.seed,
        )
        decoder = ViTDecoder(decoder_sizes, precision=precision)
    if config.data.latents:
        _check_latents(config)
    space = RAE(
        encoder,
        decoder,
        image_size=image_size,
        noise_tau=section.noise_tau,
        norm_scaled_noise=section.norm_scaled_noise,
        post_stat_norm=section.post_stat_norm,
        preln=section.preln,
        eps=section.eps,
        cached=bool(config.data.latents),
    )
    registers = make_intervention(config, encoder) if section.neurons else None
    variables = space.make_variables(
        None if space.cached else encoder_params,
        decoder_params,
        load_statistics(section.statistics) if section.statistics else None,
        None if space.cached else registers,
    )
    if mesh is None:
        return space, variables
    return place_networks(space, config, mesh), jax.device_put(variables, replicated(mesh))


def place_networks(space: RAE, config: ConfigDict, mesh: Mesh) -> RAE:
    """Returns the space with networks that split their activations over the mesh by samples.

    Parameters are replicated, so no other dimension is split. TPUs choose their attention kernel
    by the mesh (`models.kernels.attend`). The compiler gets their depth as the config names it for
    the trained network.
    """
    batch = dict(make_rules(config.sharding.rules, config.sharding.overrides))["act_batch"]
    constrain = Constrain(make_rules("replicated", [("act_batch", batch)]), mesh)
    section = config.decoder if trains_decoder(config) else config.model
    settings = {"constrain": constrain, "unroll": section.unroll}

    def place(network: Any) -> Any:
        fields = getattr(network, "__dataclass_fields__", {})
        known = {name: value for name, value in settings.items() if name in fields}
        return network.clone(**known) if known else network

    return dataclasses.replace(space, encoder=place(space.encoder), decoder=place(space.decoder))


def check_images(config: ConfigDict, key: str, origin: str) -> None:
    """Checks that a network is named, and that images have three channels.

    Args:
      config: The whole config.
      key: Key of `config.space` that names its folder.
      origin: Command that writes such a folder, for the message.

    Raises:
      ConfigError: Naming the key and a value that would do.
    """
    for wrong, problem, remedy in (
        (
            not config.space[key],
            f"config.space.{key} is not set",
            f"name a folder that {origin}",
        ),
        (
            config.data.channels != 3,
            f"config.data.channels={config.data.channels} but the encoder takes RGB images",
            "set config.data.channels=3",
        ),
        (
            config.eval.classifier,
            f"config.eval.classifier={config.eval.classifier!r} with "
            f"config.space.name={config.space.name!r}",
            "leave config.eval.classifier empty: it reads the pixels of the data set",
        ),
    ):
        if wrong:
            raise ConfigError(problem, remedy)


def make_intervention(config: ConfigDict, encoder: Encoder) -> Intervention:
    """Returns the test-time registers that `config.space` describes.

    Raises:
      DataError: If the file of neurons cannot be read.
      ConfigError: If it is of another encoder, a setting is invalid, or the encoder does not
        support test-time registers.
    """
    section, shape = config.space, neurons_shape(encoder)
    if shape is None:
        raise ConfigError(
            f"config.space.neurons={section.neurons!r}, but {type(encoder).__name__} does not "
            "support test-time registers",
            "leave it empty, or define neurons_shape and apply the intervention in the encoder",
        )
    scale = section.register_scale
    return Intervention(
        mask=neurons_to_mask(load_neurons(section.neurons), *shape),
        num_registers=section.num_registers,
        scale=scale[0] if len(scale) == 1 else scale,
        normal_values=section.normal_values,
        shared_maximum=section.shared_maximum,
        spare_first_token=section.spare_first_token,
    )


def encoding_recipe(config: ConfigDict) -> dict[str, Any]:
    """Returns the settings and file digests that determine the encoder's tokens, as JSON values."""
    keys = ("image_size", "preln", *(_REGISTERS if config.space.neurons else ()))
    values = {f"config.space.{key}": config.space[key] for key in keys}
    digests = {f"config.space.{key}": _digest(config.space[key]) for key in ("encoder", "neurons")}
    return json.loads(json.dumps(values | digests))


def _check_latents(config: ConfigDict) -> None:
    """Checks that cached latents were made by the config's encoder.

    Raises:
      DataError: If the folder holds no latents.
      ConfigError: Naming what differs.
    """
    cached, wanted = read_manifest(config.data.latents)["recipe"]["space"], encoding_recipe(config)
    keys = sorted(set(cached) | set(wanted))
    lines = [
        f"{key}: {cached.get(key)} -> {wanted.get(key)}"
        for key in keys
        if cached.get(key) != wanted.get(key)
    ]
    if lines:
        raise ConfigError(
            f"{config.data.latents} holds latents of another encoder (cached -> config):\n    "
            + "\n    ".join(lines),
            "cache them again, or use the config that they were cached with",
        )


def file_digests(config: ConfigDict) -> dict[str, str]:
    """Returns an identifier of the content of each file in `config.space`.

    It is the digest of a file or of a folder's parameters, or the encoder's name for published
    neurons.
    """
    named = {key: config.space[key] for key in FILES if config.space[key]}
    return {f"config.space.{key}": _digest(name) for key, name in named.items()}


def _digest(name: str) -> str:
    candidates = [Path(name), *(Path(name) / file for file in _IN_FOLDERS)]
    found = next((path for path in candidates if path.is_file()), None)
    return file_digest(found) if found else name


_REGISTERS = (
    *("num_registers", "register_scale", "normal_values"),
    *("shared_maximum", "spare_first_token"),
)
_IN_FOLDERS = ("params.safetensors", "statistics.safetensors")
