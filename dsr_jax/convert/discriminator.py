"""The discriminator of stage 1: DINO's backbone from its own file, the heads of a checkpoint.

Source: facebookresearch/dino vision_transformer.py, RAE stage1/disc; spec encoder 9 and 13.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dsr_jax.convert.commands import add_source_arguments, open_for
from dsr_jax.convert.encoders import Table, layer_rules, norm_rules, stacked_rules
from dsr_jax.convert.files import load_converted, save_converted
from dsr_jax.convert.hub import config_of_record
from dsr_jax.convert.readers import read_state, shape_of
from dsr_jax.convert.rules import (
    CONV,
    Layout,
    Rule,
    RuleSet,
    Stack,
    flax_to_torch,
    lazy_params,
    shapes_of,
    torch_to_flax,
)
from dsr_jax.core.cli import positive_int
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.trees import count_params
from dsr_jax.core.typing import Params, PyTree
from dsr_jax.models.discriminator import SPECTRAL, Discriminator
from dsr_jax.models.variants import DINO
from dsr_jax.models.vit import ViT, ViTConfig

FAMILY = "dino_discriminator"
"""What conversion.json calls the backbone."""

_OTHER_FILE = "check that the file is a ViT of DINO, such as dino_vit_small_patch8_224.pth"
_CONV1D = Layout((2, 1, 0))
"""[out, in, k] -> [k, in, out]."""
_PARTS = ("q", "k", "v")


def backbone_rules(config: ViTConfig) -> RuleSet:
    """Returns the rules of a backbone with separate q, k and v (`split_qkv`)."""
    top = [
        *layer_rules("patch_embed.proj", "patch_embed", CONV),
        Rule("cls_token", "cls_token"),
        Rule("pos_embed", "pos_embed"),
    ]
    block = [
        *norm_rules("norm1", "norm1"),
        *norm_rules("norm2", "norm2"),
        *layer_rules("mlp.fc1", "mlp/fc1"),
        *layer_rules("mlp.fc2", "mlp/fc2"),
    ]
    table = Table(top, block, "blocks", (*(f"attn.{part}" for part in _PARTS), "attn.proj"))
    images = jnp.zeros((1, config.patch_size, config.patch_size, 3))
    abstract = nn.unbox(jax.eval_shape(ViT(config).init, jax.random.key(0), images))["params"]
    # The discriminator reads blocks, before the final norm.
    return RuleSet((*top, *stacked_rules(config, table)), shapes_of(abstract), ("norm.*",))


def split_qkv(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Divides each fused layer `attn.qkv` into `attn.q`, `attn.k` and `attn.v`.

    Raises:
      ConversionError: If one does not divide by three.
    """
    split: dict[str, np.ndarray] = {}
    for name, x in state.items():
        if ".attn.qkv." not in name:
            split[name] = x
        elif len(x) % 3:
            raise ConversionError(f"{name} is {list(x.shape)}", "check that the file is DINO's")
        else:
            for part, piece in zip(_PARTS, np.split(x, 3), strict=True):
                split[name.replace(".qkv.", f".{part}.")] = piece
    return split


def fuse_qkv(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Fuses q, k and v; the inverse of `split_qkv`."""
    fused = {}
    for name, x in state.items():
        if ".attn.q." in name:
            parts = [state[name.replace(".q.", f".{part}.")] for part in _PARTS]
            fused[name.replace(".q.", ".qkv.")] = np.concatenate(parts)
        elif ".attn.k." not in name and ".attn.v." not in name:
            fused[name] = x
    return fused


def infer_backbone(state: Mapping[str, np.ndarray], num_heads: int = 0) -> ViTConfig:
    """Reads the sizes off a state dict.

    Args:
      state: Arrays by the original's names.
      num_heads: Number of heads, which shapes do not determine; 0 for the released widths.

    Raises:
      ConversionError: If a tensor that a size is read off is missing or of odd shape, or the heads
        are not known.
    """

    shape = functools.partial(shape_of, state, remedy=_OTHER_FILE)
    width, _, patch, _ = shape("patch_embed.proj.weight", 4)
    known = {sizes["hidden_size"]: sizes["num_heads"] for sizes in DINO.values()}
    if not num_heads and width not in known:
        raise ConversionError(
            f"no released DINO is {width} wide, and the number of attention heads cannot be read "
            "off a tensor",
            "give --num-heads",
        )
    rows = shape("pos_embed", 3)[1] - 1
    side = math.isqrt(rows)
    if side * side != rows:
        raise ConversionError(f"{rows} positions form no square", "check that the file is complete")
    sizes = {
        **DINO["S_8"],
        "image_size": side * patch,
        "patch_size": patch,
        "hidden_size": width,
        "depth": sum(f"blocks.{i}.norm1.weight" in state for i in range(len(state))),
        "num_heads": num_heads or known[width],
        "mlp_dim": shape("blocks.0.mlp.fc1.weight", 2)[0],
    }
    return ViTConfig(**sizes)


def read_backbone(
    source: str | Path, num_heads: int = 0, entry: str | None = None
) -> tuple[ViTConfig, Params]:
    """Reads a backbone's sizes and parameters.

    Args:
      source: `dino_vit_small_patch8_224.pth` or a file of the same kind.
      num_heads: Number of heads, for backbones of other widths than the released ones.
      entry: State dict inside the file.

    Raises:
      ConversionError: If anything is missing, unknown or does not fit.
    """
    state = read_state(source, entry)
    config = infer_backbone(state, num_heads)
    return config, torch_to_flax(split_qkv(state), backbone_rules(config))


def export_backbone(params: Params, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the original's state dict of a converted backbone."""
    return fuse_qkv(flax_to_torch(params, backbone_rules(config_of_record(record))))


def load_backbone(folder: str | Path) -> tuple[ViTConfig, Params]:
    """Reads a backbone that was converted into a folder.

    Raises:
      ConversionError: If there is none, or a model of another kind.
    """
    params, record = load_converted(folder)
    if record["family"] != FAMILY:
        raise ConversionError(
            f"{folder} holds a {record['family']}, not the discriminator's backbone",
            f"name a folder that python -m dsr_jax.convert {FAMILY} wrote",
        )
    return config_of_record(record), params


def heads_rules(discriminator: Discriminator) -> RuleSet:
    """Returns the rules of the heads: parameters and singular vectors of a checkpoint's `disc`.

    Targets begin with "params/" or "spectral/", the two collections.
    """
    abstract = jax.eval_shape(discriminator.init, jax.random.key(0))
    shapes = shapes_of({"params": nn.unbox(abstract[0]), SPECTRAL: abstract[1]})
    count = next(iter(shapes.values()))[0]
    rules = []
    for source, target in (("0.0", "first"), ("1.fn.0", "second"), ("2", "out")):
        rules += [
            Rule(f"{source}.weight_orig", f"params/{target}/kernel", _CONV1D),
            Rule(f"{source}.bias", f"params/{target}/bias"),
            Rule(f"{source}.weight_u", f"{SPECTRAL}/{target}/u"),
            Rule(f"{source}.weight_v", f"{SPECTRAL}/{target}/v"),
        ]
    for source, target in (("0.1", "first_norm"), ("1.fn.1", "second_norm")):
        rules += norm_rules(source, f"params/{target}")
    placed = []
    for rule in rules:
        collection, _, target = rule.target.partition("/")
        stack = (Stack(f"{collection}/heads", 0, count),)
        placed.append(Rule(f"heads.{{i}}.{rule.source}", target, rule.layout, stack))
    return RuleSet(tuple(placed), shapes)


def heads_to_flax(
    discriminator: Discriminator, state: Mapping[str, np.ndarray]
) -> tuple[Params, PyTree]:
    """Parameters and singular vectors of the heads, from a checkpoint's `disc`.

    Raises:
      ConversionError: If anything is missing, unknown or does not fit.
    """
    variables = torch_to_flax(state, heads_rules(discriminator))
    return variables["params"], variables[SPECTRAL]


def convert_backbone(args: argparse.Namespace) -> None:
    """Reads a backbone into our format."""
    opened = open_for(args, FAMILY)
    config = infer_backbone(opened.state, args.num_heads)
    params = lazy_params(split_qkv(opened.state), backbone_rules(config))
    record = {"family": FAMILY, "model": dataclasses.asdict(config)}
    save_converted(args.out, params, {**record, **opened.record})
    print(f"{args.source}: DINO with {count_params(params):,} parameters -> {args.out}")


def add_discriminator_command(families: Any) -> None:
    """Adds the backbone to the command line's families (argparse subparsers)."""
    parser = families.add_parser(FAMILY, help="frozen DINO ViT for training a decoder")
    add_source_arguments(parser, "dino_vit_small_patch8_224.pth")
    parser.add_argument(
        "--num-heads",
        type=positive_int,
        default=0,
        help="number of heads, for ViTs of other widths than the released ones",
    )
    parser.set_defaults(run=convert_backbone)
