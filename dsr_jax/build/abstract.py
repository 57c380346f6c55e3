"""Shapes of everything that a config names, even if files of frozen networks are missing."""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from dsr_jax.build.decoder import DecoderParts, make_decoder_parts
from dsr_jax.build.experiment import make_space
from dsr_jax.build.rae import place_networks
from dsr_jax.build.vae import vae_space
from dsr_jax.config import ConfigDict, has_text
from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import PyTree
from dsr_jax.data.latents import DTYPES, read_manifest
from dsr_jax.models.vae import VAEConfig
from dsr_jax.models.variants import ENCODERS, RANDOM_PREFIX
from dsr_jax.parallel.axes import Rules
from dsr_jax.parallel.processes import log
from dsr_jax.parallel.shardings import replicated
from dsr_jax.registers.neurons import PUBLISHED
from dsr_jax.spaces import RAE, InputSpace

DECODER = "ViTXL"
"""Sizes assumed for a missing decoder: those of the released ones."""

LATENTS_DTYPE = "bfloat16"
"""Dtype assumed for missing cached latents."""


def abstract_space(config: ConfigDict, mesh: Mesh | None = None) -> tuple[InputSpace, PyTree]:
    """Returns the config's input space, and its variables as shapes; no array is made.

    Missing files are logged and replaced: a folder by the preset whose name begins like the
    folder's (`converted/siglip2-base` by siglip2-base-patch16-256), neurons by the published ones.

    Args:
      config: Experiment config.
      mesh: Adds the layout of `build.make_space` to the shapes, a copy on each device.

    Raises:
      ConfigError: If no preset, or more than one, matches the name of a missing encoder.
    """
    space: InputSpace
    variables: PyTree
    if config.space.name == "rae":
        space, variables = _abstract_rae(config)
        if mesh is not None:
            space = place_networks(space, config, mesh)
    elif config.space.name == "vae" and not Path(config.space.vae).is_dir():
        _log_missing(config, "vae", "the released sizes")
        vae = vae_space(config, VAEConfig())
        side = vae.network.config.factor

        def init() -> Any:
            return nn.unbox(vae.network.init(jax.random.key(0), jnp.zeros((1, side, side, 3))))

        space, variables = vae, vae.make_variables(jax.eval_shape(init)["params"])
    else:
        space, variables = _shapes_of_space(config)
    if mesh is not None:
        whole = replicated(mesh)
        variables = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), variables
        )
    return space, variables


def abstract_batch(
    config: ConfigDict, space: InputSpace, sharding: NamedSharding | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a global batch of the data pipeline, images or cached latents."""
    data = config.data
    image: tuple[tuple[int, ...], Any] = (data.image_size, data.image_size, data.channels), "uint8"
    if data.latents:
        known = Path(data.latents).is_dir()
        dtype = read_manifest(data.latents)["dtype"] if known else LATENTS_DTYPE
        image = space.latent_shape, DTYPES[dtype]
    rows: dict[str, tuple[tuple[int, ...], Any]] = {
        "image": image,
        "index": ((), "uint32"),
    }
    if has_text(config):
        rows |= {name: ((config.language.max_length,), "int32") for name in ("tokens", "targets")}
    else:
        rows["label"] = (), "int32"
    return {
        name: jax.ShapeDtypeStruct((data.global_batch, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in rows.items()
    }


def abstract_decoder_parts(config: ConfigDict, rules: Rules) -> DecoderParts:
    """Returns the networks of a decoder's training, with shapes for frozen variables."""
    present = config.copy_and_resolve_references()
    for section, key, stand_in in (
        (present.space, "encoder", ""),
        (present.lpips, "folder", "vgg16"),
        (present.gan, "backbone", "S_8"),
    ):
        name = section[key]
        if name and not name.startswith(RANDOM_PREFIX) and not Path(name).is_dir():
            section[key] = f"{RANDOM_PREFIX}{stand_in or encoder_preset(name)}"
            log(f"{name!r} does not exist; shapes are those of {section[key]}")
    made: list[DecoderParts] = []

    def variables() -> PyTree:
        made.append(make_decoder_parts(present, None, rules))
        return made[0].variables

    shapes = jax.eval_shape(variables)
    return dataclasses.replace(made[0], variables=shapes)


def _shapes_of_space(config: ConfigDict) -> tuple[Any, Any]:
    """Returns the result of `build.make_space` with shapes for arrays."""
    made: list[tuple[InputSpace, PyTree]] = []

    def variables() -> PyTree:
        made.append(make_space(config))
        return made[0][1]

    shapes = jax.eval_shape(variables)
    return made[0][0], shapes


def _abstract_rae(config: ConfigDict) -> tuple[RAE, dict[str, Any]]:
    """Returns a representation autoencoder, any of whose files may be missing."""
    present = config.copy_and_resolve_references()
    section, absent = present.space, set()
    for key in ("encoder", "decoder", "statistics", "neurons"):
        name = section[key]
        if not name or name.startswith(RANDOM_PREFIX) or Path(name).exists():
            continue
        absent.add(key)
        if key == "encoder":
            section.encoder = f"{RANDOM_PREFIX}{encoder_preset(name)}"
            _log_missing(config, key, section.encoder)
        elif key == "decoder":
            section.decoder = f"{RANDOM_PREFIX}{DECODER}"
            _log_missing(config, key, section.decoder)
        elif key == "neurons":
            preset = section.encoder.removeprefix(RANDOM_PREFIX)
            section.neurons = next((known for known in PUBLISHED if known in (name, preset)), "")
            if section.neurons != name:
                _log_missing(config, key, section.neurons or "no test-time registers")
        else:
            section.statistics = ""
            _log_missing(config, key, "the latents'")
    if cached := bool(config.data.latents) and not Path(config.data.latents).is_dir():
        present.data.latents = ""
    space, variables = _shapes_of_space(present)
    if cached:
        space = dataclasses.replace(space, cached=True)
        variables = {key: variables[key] for key in variables if key in ("decoder", "statistics")}
    if "statistics" in absent:
        shape = jax.ShapeDtypeStruct(space.latent_shape, jnp.float32)
        variables["statistics"] = {"mean": shape, "var": shape}
    return space, variables


def encoder_preset(name: str) -> str:
    """Returns the encoder in `models.variants.ENCODERS` whose name begins like a folder's.

    Raises:
      ConfigError: If there is none, or more than one.
    """
    folder = Path(name).name
    found = [preset for preset in ENCODERS if preset == folder] or [
        preset for preset in ENCODERS if preset.startswith(folder)
    ]
    if len(found) != 1:
        raise ConfigError(
            f"config.space.encoder={name!r} does not exist, and {len(found)} known encoders have a "
            f"name that begins with {folder}",
            f"name one as {RANDOM_PREFIX}NAME, with NAME among {', '.join(ENCODERS)}",
        )
    return found[0]


def _log_missing(config: ConfigDict, key: str, instead: str) -> None:
    log(f"config.space.{key}={config.space[key]!r} does not exist; shapes are those of {instead}")
