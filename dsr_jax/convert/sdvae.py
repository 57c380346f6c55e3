"""The SD-VAE: its rule table, its sizes as diffusers states them or read off a file, the command.

Source: diffusers autoencoder_kl.py; spec denoiser 9.5 and 10.4.
"""

import argparse
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.convert.files import load_converted, save_converted, source_record
from dsr_jax.convert.hub import fetch_snapshot
from dsr_jax.convert.readers import read_state
from dsr_jax.convert.rules import (
    CONV,
    LINEAR,
    SAME,
    Rule,
    RuleSet,
    flax_to_torch,
    shapes_of,
    torch_to_flax,
)
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.files import read_json
from dsr_jax.core.trees import count_params
from dsr_jax.core.typing import Params
from dsr_jax.models.vae import AutoencoderKL, VAEConfig

FAMILY = "sdvae"
"""What conversion.json calls it."""

SCALING_FACTOR = 0.18215
"""What diffusers takes where config.json names no other."""

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
_NUMBERED = {"down": "down_blocks", "up": "up_blocks", "resnet": "resnets"}
"""The originals' names of parts, where they are others than ours."""

_OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""Names of attention's layers in files of diffusers before 0.18."""

_REQUIRED: Mapping[str, Any] = {
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
"""Options for which only the default is supported."""


@dataclass(frozen=True)
class AttentionStyle:
    """How a file writes attention's four layers.

    Attributes:
      old_names: As query, key, value and proj_attn.
      convolutions: Their weights as [C, C, 1, 1].
    """

    old_names: bool = False
    convolutions: bool = False


def sdvae_rules(config: VAEConfig) -> RuleSet:
    """The table of an autoencoder, for today's names."""
    images = jnp.zeros((1, config.factor, config.factor, config.image_channels))
    abstract = nn.unbox(jax.eval_shape(AutoencoderKL(config).init, jax.random.key(0), images))
    shapes = shapes_of(abstract["params"])
    layouts = {4: CONV, 2: LINEAR, 1: SAME}
    rules = (Rule(_source(path), path, layouts[len(shape)]) for path, shape in shapes.items())
    return RuleSet(tuple(rules), shapes)


def _source(path: str) -> str:
    """The original's name of a parameter."""
    parts = []
    for part in path.split("/"):
        kind, _, number = part.rpartition("_")
        parts.append(
            f"{_NUMBERED[kind]}.{number}" if kind in _NUMBERED else _SEGMENTS.get(part, part)
        )
    return ".".join(parts)


def modernise(
    state: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], AttentionStyle]:
    """Gives attention's layers today's names and shapes; says what the file has.

    Raises:
      ConversionError: If a layer is there under both names.
    """
    today = {old: new for new, old in _OLD_NAMES.items()}
    found, old_names, convolutions = {}, False, False
    for name, value in state.items():
        above, _, layer = name.rpartition(".attentions.0.")
        old, _, kind = layer.rpartition(".")
        if above and old in today:
            name, old_names = f"{above}.attentions.0.{today[old]}.{kind}", True
        if above and value.ndim == 4 and value.shape[2:] == (1, 1):
            value, convolutions = value[..., 0, 0], True
        if name in found:
            raise ConversionError(
                f"the file holds {name} under its old name, too", "save one of them only"
            )
        found[name] = value
    return found, AttentionStyle(old_names, convolutions)


def restyle(state: Mapping[str, np.ndarray], style: AttentionStyle) -> dict[str, np.ndarray]:
    """The inverse of `modernise`."""
    styled = {}
    for name, value in state.items():
        above, _, layer = name.rpartition(".attentions.0.")
        new, _, kind = layer.rpartition(".")
        if above and new in _OLD_NAMES:
            if style.old_names:
                name = f"{above}.attentions.0.{_OLD_NAMES[new]}.{kind}"
            if style.convolutions and kind == "weight":
                value = value[..., None, None]
        styled[name] = value
    return styled


def config_from_diffusers(record: Mapping[str, Any]) -> VAEConfig:
    """Sizes from the content of the config.json beside the weights.

    Raises:
      ConversionError: If it describes another network, or options that are not supported.
    """
    kind = record.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise ConversionError(f"config.json describes a {kind!r}", "give an AutoencoderKL")
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
    needed = {
        **_REQUIRED,
        "out_channels": sizes["in_channels"],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    if wrong := {
        name: record[name] for name, value in needed.items() if record.get(name, value) != value
    }:
        raise ConversionError(
            f"config.json sets {wrong}, which is not supported",
            f"needed is { {name: needed[name] for name in wrong} }",
        )
    return VAEConfig(
        image_channels=sizes["in_channels"],
        latent_channels=sizes["latent_channels"],
        widths=tuple(sizes["block_out_channels"]),
        layers_per_block=sizes["layers_per_block"],
        num_groups=sizes["norm_num_groups"],
    )


def infer_config(state: Mapping[str, np.ndarray], num_groups: int = 0) -> VAEConfig:
    """Reads the sizes off a state dict under today's names.

    Args:
      state: Arrays by the original's names.
      num_groups: Groups of the norms, which no shape tells; 0 for the released 32.

    Raises:
      ConversionError: If the file is of another network.
    """
    width = "encoder.down_blocks.{}.resnets.{}.conv1.weight"
    needed = ("encoder.conv_in.weight", "post_quant_conv.weight", width.format(0, 0))
    if absent := [key for key in needed if key not in state]:
        raise ConversionError(
            f"this is no AutoencoderKL of diffusers: {', '.join(absent)} missing; it begins with "
            f"{', '.join(list(state)[:4])}",
            "give the file or folder of the autoencoder itself",
        )
    levels = _count(state, r"encoder\.down_blocks\.(\d+)\.")
    return VAEConfig(
        image_channels=state["encoder.conv_in.weight"].shape[1],
        latent_channels=state["post_quant_conv.weight"].shape[0],
        widths=tuple(
            len(state[key]) for i in range(levels) if (key := width.format(i, 0)) in state
        ),
        layers_per_block=_count(state, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        num_groups=num_groups or VAEConfig.num_groups,
    )


def _count(state: Mapping[str, np.ndarray], pattern: str) -> int:
    found = [re.match(pattern, key) for key in state]
    return 1 + max(int(match[1]) for match in found if match)


@dataclass(frozen=True)
class SDVAE:
    """An autoencoder that was read.

    Attributes:
      config: Sizes.
      params: The tree.
      scale: Factor on latents.
      style: How its file writes attention.
    """

    config: VAEConfig
    params: Params
    scale: float = SCALING_FACTOR
    style: AttentionStyle = AttentionStyle()


def read_vae(source: str | Path, *, num_groups: int = 0, entry: str | None = None) -> SDVAE:
    """Reads an autoencoder.

    Args:
      source: Snapshot folder, hub id, or a file of weights. A config.json in the folder, or beside
        the file, states the sizes; else they are read off the weights.
      num_groups: Groups of the norms, where there is no config.json; 0 for the released 32.
      entry: State dict inside a torch file.

    Raises:
      ConversionError: If anything is missing, unknown or does not fit.
    """
    path = fetch_snapshot(str(source))
    state, style = modernise(read_state(path, entry))
    record, described = {}, (path if path.is_dir() else path.parent) / "config.json"
    if described.is_file():
        record = read_json(described)
        config = config_from_diffusers(record)
    else:
        config = infer_config(state, num_groups)
    scale = record.get("scaling_factor", SCALING_FACTOR)
    return SDVAE(config, torch_to_flax(state, sdvae_rules(config)), scale, style)


def save_vae(folder: str | Path, vae: SDVAE, record: Mapping[str, Any]) -> None:
    """Writes a folder that `load_vae` reads.

    Args:
      folder: A new or empty folder.
      vae: What to write.
      record: What else to write down, such as the source and its digest.
    """
    facts = {
        "family": FAMILY,
        "model": dataclasses.asdict(vae.config),
        "scale": vae.scale,
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
            f"{folder} holds a {record['family']}, not an SD-VAE",
            f"name a folder that python -m dsr_jax.convert {FAMILY} wrote",
        )
    return _from_record(params, record)


def _from_record(params: Params, record: Mapping[str, Any]) -> SDVAE:
    sizes = {**record["model"], "widths": tuple(record["model"]["widths"])}
    return SDVAE(VAEConfig(**sizes), params, record["scale"], AttentionStyle(**record["style"]))


def export_vae(params: Params, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The original's state dict of a converted autoencoder, as its source wrote it."""
    vae = _from_record(params, record)
    return restyle(flax_to_torch(vae.params, sdvae_rules(vae.config)), vae.style)


def convert_vae(args: argparse.Namespace) -> None:
    """Reads an autoencoder into our format."""
    vae = read_vae(args.source, num_groups=args.num_groups, entry=args.entry)
    save_vae(args.out, vae, {"entry": args.entry, **source_record(args.source)})
    print(f"{args.source}: SD-VAE with {count_params(vae.params):,} parameters -> {args.out}")


def add_vae_command(families: Any) -> None:
    """Adds the SD-VAE to the command line's families (argparse subparsers)."""
    parser = families.add_parser(FAMILY, help="Stable Diffusion's VAE, which SiT works in")
    parser.add_argument("--source", required=True, help="snapshot folder, hub id or file")
    parser.add_argument("--out", required=True, help="new folder")
    parser.add_argument("--entry", help="state dict inside a torch file")
    parser.add_argument(
        "--num-groups", type=int, default=0, help="of norms, without a config.json; default 32"
    )
    parser.set_defaults(run=convert_vae)
