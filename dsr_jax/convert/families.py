"""The commands that convert denoisers, and the export of a converted one."""

import argparse
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from dsr_jax.convert.commands import add_source_arguments, open_for
from dsr_jax.convert.converter import DenoiserConverter, find_converter, require_converter
from dsr_jax.convert.files import save_converted
from dsr_jax.convert.rules import flax_to_torch, lazy_params
from dsr_jax.core.cli import positive_int
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.trees import count_params
from dsr_jax.core.typing import Params
from dsr_jax.models.registry import DENOISERS, denoiser_class, model_sizes

_OPTIONS: Mapping[str, tuple[int, str]] = MappingProxyType(
    {
        "num_heads": (0, "default: read off the file, or that of a released size"),
        "register_start": (
            -1,
            "first block with registers; needed if the file has registers, default: none",
        ),
        "decoder_num_heads": (0, "heads of the wide blocks; default: read off the rope table"),
        "decoder_depth": (0, "number of wide blocks; default: read off their width"),
        "class_token_start": (-1, "first block with class tokens; default: that of its size"),
    }
)
"""Defaults and explanations of sizes that a file may not hold."""


def converters() -> dict[str, DenoiserConverter]:
    """Returns the converters of the package's denoisers by the name of the denoiser."""
    found = {name: find_converter(denoiser_class(name)) for name in DENOISERS}
    return {name: converter for name, converter in found.items() if converter is not None}


def convert_denoiser(args: argparse.Namespace) -> None:
    """Reads an official denoiser's file into our format."""
    family = require_converter(denoiser_class(args.family))
    opened = open_for(args, args.family)
    state = family.strip_prefix(opened.state)
    model = family.infer(state, **{name: getattr(args, name) for name in family.options})
    params = lazy_params(state, family.rules(model))
    record = {"family": args.family, "model": model_sizes(model)}
    save_converted(args.out, params, {**record, **opened.record})
    kind, count = type(model).__name__, count_params(params)
    print(f"{args.source}: {kind} with {count:,} parameters -> {args.out}")


def export_denoiser(params: Params, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the original's state dict of a converted denoiser.

    Raises:
      ConversionError: If the denoiser has no converter, or has what the original lacks.
    """
    kind = denoiser_class(record["family"])
    family, model = require_converter(kind), kind(**record["model"])
    if getattr(model, "register_gate", False):
        raise ConversionError(
            "this denoiser's registers are behind a gate, which the original does not have",
            "train with config.registers.gate=False to export, or take the registers away with "
            "tools/add_registers.py --ablate",
        )
    if obstacle := family.obstacle(model):
        raise ConversionError(
            f"the official {type(model).__name__} cannot hold this denoiser: {obstacle}",
            "export to a folder (--out without .pt or .safetensors), which sample and train read",
        )
    if getattr(model, "num_registers", 0) and not family.has_registers:
        print(
            f"note: the released {type(model).__name__} has no registers; its class needs them "
            "before it loads this export"
        )
    state = flax_to_torch(params, family.rules(model)) | family.constants(model)
    return {family.prefix + name: value for name, value in state.items()}


def add_denoiser_commands(families: Any) -> None:
    """Adds a command for each denoiser to the subparsers."""
    for name, family in converters().items():
        parser = families.add_parser(name, help=family.help)
        add_source_arguments(parser, "ep-*.pt, a safetensors file, or a folder that holds one")
        for option in family.options:
            default, explanation = _OPTIONS[option]
            flag = f"--{option.replace('_', '-')}"
            # Block 0 is the first; numbers of heads and blocks are positive.
            kind = int if default < 0 else positive_int
            parser.add_argument(flag, type=kind, default=default, help=explanation)
        parser.set_defaults(run=convert_denoiser, family=name)
