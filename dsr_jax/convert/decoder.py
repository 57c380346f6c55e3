"""RAE's decoder: its rule table, its sizes read off a file, and the command.

Source: RAE and DSR stage1/decoders and utils (checkpoints hold `encoder.*` and `decoder.*`); spec
encoder 3, 7 and 13.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.convert.commands import add_source_arguments, open_for
from dsr_jax.convert.encoders import layer_rules, mae_table, norm_rules, stacked_rules
from dsr_jax.convert.files import load_converted, save_converted
from dsr_jax.convert.readers import read_state, shape_of
from dsr_jax.convert.rules import Rule, RuleSet, lazy_params, shapes_of, torch_to_flax
from dsr_jax.core.cli import positive_int
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.trees import count_params
from dsr_jax.core.typing import Params
from dsr_jax.models.decoder import DecoderConfig, ViTDecoder
from dsr_jax.models.variants import DECODERS

FAMILY = "decoder"
"""What conversion.json calls it."""

_ANCHOR = "trainable_cls_token"
_LAYER = "decoder_layers.{}."
_OTHER_FILE = "check that the file is RAE's decoder"


def take_decoder(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Takes the decoder out of a file of its own or a checkpoint of RAE, without prefix.

    Raises:
      ConversionError: If there is none, or something unknown beside it.
    """
    prefixes = [key.removesuffix(_ANCHOR) for key in state if key.endswith(_ANCHOR)]
    if len(prefixes) != 1:
        raise ConversionError(
            f"{len(prefixes)} tensors are named ...{_ANCHOR}, which a decoder of RAE has once; the "
            f"file begins with {', '.join(list(state)[:4])}",
            "give a decoder that was trained with RAE; MAE's own decoder is another network",
        )
    (prefix,) = prefixes
    beside = [key for key in state if not key.startswith((prefix, "encoder."))]
    if prefix and beside:
        raise ConversionError(
            f"unknown tensors besides the decoder {prefix}*: {', '.join(beside[:8])}",
            "check that the file is a decoder's, or a checkpoint of RAE",
        )
    return {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}


def infer_decoder(state: Mapping[str, np.ndarray], num_heads: int = 0) -> DecoderConfig:
    """Reads the sizes off a state dict without prefix.

    Args:
      state: Arrays by the original's names.
      num_heads: Number of heads, which shapes do not determine; 0 for the released sizes.

    Raises:
      ConversionError: If a tensor that a size is read off is missing or of odd shape, or the heads
        are not known.
    """

    shape = functools.partial(shape_of, state, remedy=_OTHER_FILE)
    width, channels = shape("decoder_embed.weight", 2)
    sizes = {
        "hidden_size": width,
        "depth": sum(_LAYER.format(i) + "output.dense.bias" in state for i in range(len(state))),
        "mlp_dim": shape(_LAYER.format(0) + "intermediate.dense.weight", 2)[0],
    }
    known = [p["num_heads"] for p in DECODERS.values() if sizes.items() <= p.items()]
    if not num_heads and not known:
        raise ConversionError(
            f"no released decoder has {sizes}, and the number of attention heads cannot be read "
            "off a tensor",
            "give --num-heads (decoder_num_attention_heads of its config.json)",
        )
    return DecoderConfig(
        latent_channels=channels,
        grid=_side(shape("decoder_pos_embed", 3)[1] - 1, "positions"),
        patch_size=_side(shape("decoder_pred.weight", 2)[0] // 3, "pixels of a patch"),
        num_heads=num_heads or known[0],
        **sizes,
    )


def _side(count: int, what: str) -> int:
    side = math.isqrt(count)
    if side * side != count:
        raise ConversionError(f"{count} {what} form no square", "check that the file is complete")
    return side


def decoder_rules(config: DecoderConfig) -> RuleSet:
    """Returns the rules of a decoder, for names without prefix."""
    top = [
        *layer_rules("decoder_embed", "embed"),
        *norm_rules("decoder_norm", "norm"),
        *layer_rules("decoder_pred", "pred"),
        Rule("trainable_cls_token", "cls_token"),
        Rule("decoder_pos_embed", "pos_embed"),
    ]
    blocks = stacked_rules(config.blocks, mae_table(top, "decoder_layers"))
    tokens = jnp.zeros((1, config.grid**2, config.latent_channels))
    abstract = nn.unbox(jax.eval_shape(ViTDecoder(config).init, jax.random.key(0), tokens))
    return RuleSet((*top, *blocks), shapes_of(abstract["params"]))


def read_decoder(
    source: str | Path, *, num_heads: int = 0, entry: str | None = None
) -> tuple[DecoderConfig, Params]:
    """Reads a decoder's sizes and parameters.

    Args:
      source: The decoder's own file, or a checkpoint of RAE.
      num_heads: Number of heads, for decoders of other sizes than the released ones.
      entry: State dict inside a torch file; default "ema", else "model".

    Raises:
      ConversionError: If anything is missing, unknown or does not fit.
    """
    state = take_decoder(read_state(source, entry))
    config = infer_decoder(state, num_heads)
    return config, torch_to_flax(state, decoder_rules(config))


def load_decoder(folder: str | Path) -> tuple[DecoderConfig, Params]:
    """Reads a decoder that was converted into a folder.

    Raises:
      ConversionError: If there is none, or a model of another kind.
    """
    params, record = load_converted(folder)
    if record["family"] != FAMILY:
        raise ConversionError(
            f"{folder} holds a {record['family']}, not a decoder",
            "name a folder that python -m dsr_jax.convert decoder wrote",
        )
    return DecoderConfig(**record["model"]), params


def save_decoder(
    folder: str | Path, config: DecoderConfig, params: Params, record: Mapping[str, Any]
) -> None:
    """Writes a folder that `load_decoder` reads.

    Args:
      folder: A new or empty folder.
      config: Sizes.
      params: The tree.
      record: Further entries of the record, such as the source and its digest.
    """
    sizes = {"family": FAMILY, "model": dataclasses.asdict(config)}
    save_converted(folder, params, {**sizes, **record})


def convert_decoder(args: argparse.Namespace) -> None:
    """Reads a decoder into our format."""
    opened = open_for(args, FAMILY)
    state = take_decoder(opened.state)
    config = infer_decoder(state, args.num_heads)
    params = lazy_params(state, decoder_rules(config))
    save_decoder(args.out, config, params, opened.record)
    print(f"{args.source}: decoder with {count_params(params):,} parameters -> {args.out}")


def add_decoder_command(families: Any) -> None:
    """Adds the decoder to the command line's families (argparse subparsers)."""
    parser = families.add_parser(FAMILY, help="RAE's decoder")
    add_source_arguments(parser, "its own file, or a checkpoint of RAE")
    parser.add_argument(
        "--num-heads",
        type=positive_int,
        default=0,
        help="number of heads, for decoders of other sizes than the released ones",
    )
    parser.set_defaults(run=convert_decoder)
