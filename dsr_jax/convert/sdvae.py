"""AutoencoderKL: its rule table, its sizes from a config.json or read off a file, the command.

Source: diffusers autoencoder_kl.py; spec denoiser 9.5 and 10.4.
"""

import argparse
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.convert.commands import add_source_arguments, open_for
from dsr_jax.convert.fetch import fetch_snapshot
from dsr_jax.convert.files import load_converted, save_converted
from dsr_jax.convert.readers import read_state
from dsr_jax.convert.rules import (
    CONV,
    LINEAR,
    SAME,
    Rule,
    RuleSet,
    check_values,
    flax_to_torch,
    lazy_params,
    shapes_of,
)
from dsr_jax.convert.vae_names import NameStyle, modernize, restyle
from dsr_jax.core.cli import positive_int
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.files import name_damage, read_object
from dsr_jax.core.trees import count_params, flatten_names, unflatten_names
from dsr_jax.core.typing import Params
from dsr_jax.models.latent_normalization import LatentNormalization
from dsr_jax.models.vae import AutoencoderKL, VAEConfig

FAMILY = "sdvae"
"""What conversion.json calls it."""

_SEGMENTS = {
    "mid": "mid_block",
    "attn": "attentions.0",
    "downsample": "downsamplers.0.conv",
    "upsample": "upsamplers.0.conv",
    "shortcut": "conv_shortcut",
    "norm_out": "conv_norm_out",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "out": "to_out.0",
    "kernel": "weight",
    "scale": "weight",
}
_NUMBERED = {
    "down": "down_blocks",
    "up": "up_blocks",
    "resnet": "resnets",
    "attn": "attentions",
}
"""The originals' names of parts, where they are others than ours."""

_REQUIRED: Mapping[str, Any] = {"act_fn": "silu"}
"""Options for which only the default is supported."""

_LEVELS = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
}
"""Kinds of levels without attention and with it."""


def sdvae_rules(config: VAEConfig) -> RuleSet:
    """Returns the rules of an autoencoder, for today's names."""
    images = jnp.zeros((1, config.factor, config.factor, config.image_channels))
    abstract = nn.unbox(jax.eval_shape(AutoencoderKL(config).init, jax.random.key(0), images))
    shapes = shapes_of(abstract["params"])
    layouts = {4: CONV, 2: LINEAR, 1: SAME}
    rules = (Rule(_source(path), path, layouts[len(shape)]) for path, shape in shapes.items())
    return RuleSet(tuple(rules), shapes)


def _source(path: str) -> str:
    """Returns the original's name of a parameter."""
    parts = []
    for part in path.split("/"):
        kind, _, number = part.rpartition("_")
        parts.append(
            f"{_NUMBERED[kind]}.{number}" if kind in _NUMBERED else _SEGMENTS.get(part, part)
        )
    return ".".join(parts)


def config_from_diffusers(record: Mapping[str, Any]) -> VAEConfig:
    """Sizes from the content of the config.json beside the weights.

    Raises:
      ConversionError: If it describes another network, or options that are not supported.
    """
    kind = record.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise ConversionError(
            f"config.json describes a {kind!r}, which is not supported", "give an AutoencoderKL"
        )
    sizes = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [64],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 32,
        **record,
    }
    levels = len(sizes["block_out_channels"])
    needed = {**_REQUIRED, "out_channels": sizes["in_channels"]}
    wrong = {
        name: record[name] for name, value in needed.items() if record.get(name, value) != value
    }
    for name, kinds in _LEVELS.items():
        given = record.get(name, [kinds[0]] * levels)
        if len(given) != levels or not set(given) <= set(kinds):
            wrong[name], needed[name] = given, f"{levels} of {' or '.join(kinds)}"
    if wrong:
        raise ConversionError(
            f"config.json sets {wrong}, which is not supported",
            f"needed is { {name: needed[name] for name in wrong} }",
        )
    attending = {
        name: tuple(i for i, kind in enumerate(record.get(name, ())) if kind == kinds[1])
        for name, kinds in _LEVELS.items()
    }
    return VAEConfig(
        image_channels=sizes["in_channels"],
        latent_channels=sizes["latent_channels"],
        widths=tuple(sizes["block_out_channels"]),
        layers_per_block=sizes["layers_per_block"],
        num_groups=sizes["norm_num_groups"],
        encoder_attention=attending["down_block_types"],
        decoder_attention=attending["up_block_types"],
        middle_attention=record.get("mid_block_add_attention", True),
        quant_conv=record.get("use_quant_conv", True),
        post_quant_conv=record.get("use_post_quant_conv", True),
    )


def infer_config(state: Mapping[str, np.ndarray], num_groups: int = 0) -> VAEConfig:
    """Reads the sizes off a state dict under today's names.

    Args:
      state: Arrays by diffusers' names.
      num_groups: Groups of the norms, which no shape shows; 0 for the released 32.

    Raises:
      ConversionError: If the file is of another network.
    """
    width = "encoder.down_blocks.{}.resnets.{}.conv1.weight"
    needed = ("encoder.conv_in.weight", "decoder.conv_in.weight", width.format(0, 0))
    if absent := [key for key in needed if key not in state]:
        raise ConversionError(
            f"this is no AutoencoderKL of diffusers or latent-diffusion: {', '.join(absent)} "
            f"missing; it begins with {', '.join(list(state)[:4])}",
            "give the file or folder of the autoencoder itself",
        )
    levels = _count(state, r"encoder\.down_blocks\.(\d+)\.")

    def attending(blocks: str) -> tuple[int, ...]:
        return tuple(i for i in range(levels) if f"{blocks}.{i}.attentions.0.to_q.weight" in state)

    return VAEConfig(
        image_channels=state["encoder.conv_in.weight"].shape[1],
        latent_channels=state["decoder.conv_in.weight"].shape[1],
        widths=tuple(
            len(state[key]) for i in range(levels) if (key := width.format(i, 0)) in state
        ),
        layers_per_block=_count(state, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        num_groups=num_groups or VAEConfig.num_groups,
        encoder_attention=attending("encoder.down_blocks"),
        decoder_attention=attending("decoder.up_blocks"),
        middle_attention="encoder.mid_block.attentions.0.to_q.weight" in state,
        quant_conv="quant_conv.weight" in state,
        post_quant_conv="post_quant_conv.weight" in state,
    )


def _count(state: Mapping[str, np.ndarray], pattern: str) -> int:
    found = [re.match(pattern, key) for key in state]
    return 1 + max(int(match[1]) for match in found if match)


@dataclass(frozen=True)
class SDVAE:
    """Autoencoder read from a file.

    Attributes:
      config: Sizes.
      params: The tree.
      normalization: Normalization of its latents, before they enter a denoiser.
      style: Names and shapes of tensors in its file.
    """

    config: VAEConfig
    params: Params
    normalization: LatentNormalization = LatentNormalization()
    style: NameStyle = NameStyle()


def read_vae(
    source: str | Path,
    *,
    num_groups: int = 0,
    entry: str | None = None,
    given: Mapping[str, Any] = MappingProxyType({}),
) -> SDVAE:
    """Reads an autoencoder.

    Args:
      source: Snapshot folder, hub id, or a file of weights. A config.json in the folder, or beside
        the file, states the sizes; else they are read off the weights.
      num_groups: Groups of the norms, where there is no config.json; 0 for the released 32.
      entry: State dict inside a torch file.
      given: Fields of `LatentNormalization` that take the place of the config.json's.

    Raises:
      ConversionError: If anything is missing, unknown or does not fit.
    """
    path = fetch_snapshot(str(source))
    vae = _open_vae(path, read_state(path, entry), num_groups, given)
    params = {name: leaf.read() for name, leaf in flatten_names(vae.params).items()}
    return dataclasses.replace(vae, params=unflatten_names(params))


def _open_vae(
    path: Path, state: Mapping[str, np.ndarray], num_groups: int, given: Mapping[str, Any]
) -> SDVAE:
    """Returns the autoencoder with parameters that are read when they are written."""
    state, style = modernize(state)
    record: Mapping[str, Any] = {}
    described = (path if path.is_dir() else path.parent) / "config.json"
    if described.is_file() and not style.ldm:
        record = read_object(described, "copy the snapshot again")
        with name_damage(described, "copy the snapshot again"):
            config = config_from_diffusers(record)
    else:
        config = infer_config(state, num_groups)
    normalization = _normalization(config, record, given)
    return SDVAE(config, lazy_params(state, sdvae_rules(config)), normalization, style)


def _normalization(
    config: VAEConfig, record: Mapping[str, Any], given: Mapping[str, Any]
) -> LatentNormalization:
    """Returns how latents are normalized: as given, else as a config.json has it.

    Raises:
      ConversionError: If neither does, and the latents are not those of the SD-VAE; or if two ways
        exclude each other.
    """
    names = {
        "scale": "scaling_factor",
        "shift": "shift_factor",
        "mean": "latents_mean",
        "std": "latents_std",
    }
    known = {ours: record[name] for ours, name in names.items() if record.get(name) is not None}
    known |= given
    if "scale" not in known:
        if "std" in known:
            known["scale"] = 1.0
        elif record or config.latent_channels == VAEConfig.latent_channels:
            known["scale"] = LatentNormalization.scale
        else:
            raise ConversionError(
                f"the file does not hold the factor on its {config.latent_channels}-channel "
                "latents with which denoisers are trained",
                "give --scale, and --shift or --statistics where there is one (MAR's KL-16: "
                "--scale 0.2325; Flux: --scale 0.3611 --shift 0.1159; VA-VAE: --statistics "
                "latents_stats.pt)",
            )
    channels = {name: tuple(map(float, known[name])) for name in ("mean", "std") if name in known}
    if channels and ("shift" in known or len(channels) < 2):
        raise ConversionError(
            f"latents are normalized by {', '.join(sorted(known))}",
            "give mean and standard deviation of the channels, or a shift, and a scale",
        )
    if any(len(values) != config.latent_channels for values in channels.values()):
        raise ConversionError(
            f"statistics of {', '.join(str(len(x)) for x in channels.values())} channels for "
            f"latents of {config.latent_channels}",
            "give the statistics of this autoencoder",
        )
    return LatentNormalization(float(known["scale"]), float(known.get("shift", 0.0)), **channels)


def read_channel_statistics(path: str | Path) -> dict[str, np.ndarray]:
    """Reads "mean" and "std" [C] of latents' channels, such as LightningDiT's latents_stats.pt.

    Raises:
      ConversionError: If the file holds something else.
    """
    state = read_state(path)
    found = {name: np.asarray(x, np.float32).reshape(-1) for name, x in state.items()}
    if set(found) != {"mean", "std"} or not (found["std"] > 0).all():
        raise ConversionError(
            f"{path} holds {', '.join(sorted(found))}",
            "statistics of channels hold mean and std, and no std of 0",
        )
    check_values(found)
    return found


def save_vae(folder: str | Path, vae: SDVAE, record: Mapping[str, Any]) -> None:
    """Writes a folder that `load_vae` reads.

    Args:
      folder: A new or empty folder.
      vae: Autoencoder to write.
      record: Further entries of the record, such as the source and its digest.
    """
    facts = {
        "family": FAMILY,
        "model": dataclasses.asdict(vae.config),
        **dataclasses.asdict(vae.normalization),
        "style": dataclasses.asdict(vae.style),
    }
    save_converted(folder, vae.params, {**facts, **record})


def load_vae(folder: str | Path) -> SDVAE:
    """Reads an autoencoder that was converted into a folder.

    Raises:
      ConversionError: If there is none, or a model of another kind.
    """
    params, record = load_converted(folder)
    if record["family"] != FAMILY:
        raise ConversionError(
            f"{folder} holds a {record['family']}, not an autoencoder",
            f"name a folder that python -m dsr_jax.convert {FAMILY} wrote",
        )
    return _from_record(params, record)


def _from_record(params: Params, record: Mapping[str, Any]) -> SDVAE:
    fields = [field.name for field in dataclasses.fields(LatentNormalization)]
    values = _with_tuples({name: record[name] for name in fields if name in record})
    return SDVAE(
        VAEConfig(**_with_tuples(record["model"])),
        params,
        LatentNormalization(**values),
        NameStyle(**record["style"]),
    )


def _with_tuples(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(x) if isinstance(x, list) else x for name, x in record.items()}


def export_vae(params: Params, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the original's state dict of a converted autoencoder, as its source wrote it."""
    vae = _from_record(params, record)
    return restyle(flax_to_torch(vae.params, sdvae_rules(vae.config)), vae.style)


def convert_vae(args: argparse.Namespace) -> None:
    """Reads an autoencoder into our format."""
    given: dict[str, Any] = {
        name: getattr(args, name) for name in ("scale", "shift") if getattr(args, name) is not None
    }
    if args.statistics:
        given |= read_channel_statistics(args.statistics)
    opened = open_for(args, FAMILY)
    vae = _open_vae(opened.path, opened.state, args.num_groups, given)
    save_vae(args.out, vae, opened.record)
    print(
        f"{args.source}: AutoencoderKL with {count_params(vae.params):,} parameters -> {args.out}"
    )


def add_vae_command(families: Any) -> None:
    """Adds AutoencoderKL to the command line's families (argparse subparsers)."""
    parser = families.add_parser(
        FAMILY, help="AutoencoderKL: the VAE of SD and SiT, Flux's, VA-VAE, MAR's KL-16"
    )
    add_source_arguments(parser, "snapshot folder, hub id or file")
    add, groups = parser.add_argument, "groups of the norms, without a config.json; default 32"
    add("--num-groups", type=positive_int, default=0, help=groups)
    add("--scale", type=float, help="factor on latents; default: that of config.json")
    add("--shift", type=float, help="subtracted before scaling; default: that of config.json")
    add("--statistics", help="file of mean and std of the latents' channels (latents_stats.pt)")
    parser.set_defaults(run=convert_vae)
