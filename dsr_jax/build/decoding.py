"""Builds the part of an input space that sampling needs: the decoder, without an encoder."""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dsr_jax.build.abstract import encoder_preset
from dsr_jax.build.experiment import make_space
from dsr_jax.build.frozen import open_decoder
from dsr_jax.build.rae import PATCHES, check_images, place_networks
from dsr_jax.config import ConfigDict
from dsr_jax.convert.encoders import FAMILIES
from dsr_jax.convert.files import read_conversion
from dsr_jax.convert.hub import config_of_record
from dsr_jax.convert.statistics import load_statistics
from dsr_jax.core.plugins import is_reference
from dsr_jax.core.typing import PyTree
from dsr_jax.models.decoder import ViTDecoder
from dsr_jax.models.precision import Precision
from dsr_jax.models.variants import ENCODERS, RANDOM_ENCODERS, RANDOM_PREFIX
from dsr_jax.models.vit import ViT, ViTConfig
from dsr_jax.parallel.processes import log
from dsr_jax.parallel.shardings import replicated
from dsr_jax.spaces import RAE, InputSpace


def make_decoding_space(config: ConfigDict, mesh: Mesh | None = None) -> tuple[InputSpace, PyTree]:
    """Returns the space and the frozen variables that `decode` takes.

    Of a representation autoencoder, the encoder's parameters are not read, and its folder may be
    absent: sizes and pixel statistics are then those of the known encoder whose name begins like
    the folder's.

    Args:
      config: Experiment config.
      mesh: Mesh over which the variables are replicated; None leaves them in host memory.

    Raises:
      ConversionError: If the decoder or the statistics are missing, damaged or of another kind.
      ConfigError: If they do not fit each other, or the encoder is not known by its name.
    """
    sizes = _encoder_sizes(config) if config.space.name == "rae" else None
    if sizes is None:
        return make_space(config, mesh)
    section = config.space
    side = section.image_size or PATCHES * sizes.patch_size
    decoder: Any = None
    params: Any = None
    if section.decoder:
        decoder_sizes, params = open_decoder(
            "config.space.decoder",
            section.decoder,
            sizes.hidden_size,
            side // sizes.patch_size,
            config.data.image_size,
            config.seed,
        )
        decoder = ViTDecoder(decoder_sizes, precision=Precision(config.precision.compute))
    space = RAE(ViT(sizes), decoder, image_size=side, noise_tau=0.0, eps=section.eps)
    statistics = load_statistics(section.statistics) if section.statistics else None
    variables = space.make_variables(None, params, statistics)
    if mesh is None:
        return space, variables
    return place_networks(space, config, mesh), jax.device_put(variables, replicated(mesh))


def _encoder_sizes(config: ConfigDict) -> ViTConfig | None:
    """Returns sizes and pixel statistics of the encoder; None for one that is no ViT of ours."""
    check_images(
        config, "encoder", "python -m dsr_jax.convert wrote, or a name such as dinov2-base"
    )
    name = config.space.encoder
    record_path = Path(name) / "conversion.json"
    if record_path.is_file():
        record = read_conversion(name, ("family", "model"))
        return config_of_record(record) if record["family"] in FAMILIES else None
    preset = name.removeprefix(RANDOM_PREFIX)
    if name.startswith(RANDOM_PREFIX):
        known = not is_reference(preset) and preset in RANDOM_ENCODERS
        return ViTConfig(**RANDOM_ENCODERS[preset]) if known else None
    if Path(name).exists():
        return None
    preset = encoder_preset(name)
    log(f"config.space.encoder={name!r}: sampling needs the sizes and pixel statistics of {preset}")
    return ViTConfig(**ENCODERS[preset])
