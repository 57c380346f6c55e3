"""The denoisers that can be converted, by the name that their folders record; their commands."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from dsr_jax.convert import dit_dh, jit, lightningdit, sit
from dsr_jax.convert.files import save_converted, source_record
from dsr_jax.convert.readers import read_state
from dsr_jax.convert.rules import RuleSet, flax_to_torch, torch_to_flax
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.trees import count_params
from dsr_jax.core.typing import Params
from dsr_jax.models.denoiser import DiffusionTransformer
from dsr_jax.models.dit import LightningDiT
from dsr_jax.models.dit_dh import DiTDH
from dsr_jax.models.jit import JiT
from dsr_jax.models.sit import SiT

_NOT_SIZES = ("parent", "name", "precision", "constrain", "remat", "attention", "dropout")

_OPTIONS: Mapping[str, tuple[int, str]] = MappingProxyType(
    {
        "num_heads": (0, "default: read off the file, or that of a released size"),
        "register_start": (-1, "first block with registers"),
        "decoder_num_heads": (0, "heads of the wide blocks; default: read off the rope table"),
        "decoder_depth": (0, "number of wide blocks; default: read off their width"),
        "class_token_start": (-1, "first block with class tokens; default: that of its size"),
    }
)
"""Defaults and explanations of what a file may not tell."""


@dataclass(frozen=True)
class DenoiserFamily:
    """What conversion needs to know of one kind of denoiser.

    Attributes:
      model: Class of the network.
      rules: Table of a network.
      constants: What a network's state dict holds besides parameters.
      infer: Reads a network's sizes off a state dict.
      options: Sizes that `infer` takes, for files that do not tell them.
      help: What the family is, in a few words.
      prefix: What checkpoints put before every name.
      entries: State dicts of its checkpoints.
    """

    model: type[DiffusionTransformer]
    rules: Callable[[Any], RuleSet]
    constants: Callable[[Any], dict[str, np.ndarray]]
    infer: Callable[..., DiffusionTransformer]
    options: tuple[str, ...]
    help: str
    prefix: str = ""
    entries: tuple[str, ...] = ("ema",)


DENOISERS: Mapping[str, DenoiserFamily] = MappingProxyType(
    {
        "lightningdit": DenoiserFamily(
            LightningDiT,
            lightningdit.lightningdit_rules,
            lightningdit.rope_buffers,
            lightningdit.infer_model,
            ("num_heads", "register_start"),
            "DSR's and RAE's denoiser",
        ),
        "ditdh": DenoiserFamily(
            DiTDH,
            dit_dh.dit_dh_rules,
            dit_dh.rope_buffers,
            dit_dh.infer_model,
            ("num_heads", "register_start", "decoder_num_heads", "decoder_depth"),
            "their denoiser with a wide shallow head (DiTwDDTHead)",
        ),
        "sit": DenoiserFamily(
            SiT,
            sit.sit_rules,
            lightningdit.rope_buffers,
            sit.infer_model,
            ("num_heads", "register_start"),
            "SiT, the denoiser on the latents of a VAE",
        ),
        "jit": DenoiserFamily(
            JiT,
            jit.jit_rules,
            jit.rope_buffers,
            jit.infer_model,
            ("num_heads", "class_token_start", "register_start"),
            "JiT, the denoiser on pixels",
            jit.PREFIX,
            jit.ENTRIES,
        ),
    }
)


def family_of(model: DiffusionTransformer) -> DenoiserFamily:
    """The family that a network belongs to."""
    return next(family for family in DENOISERS.values() if family.model is type(model))


def model_sizes(model: DiffusionTransformer) -> dict[str, Any]:
    """The constructor arguments that a checkpoint fixes."""
    names = [field.name for field in dataclasses.fields(model) if field.name not in _NOT_SIZES]
    return {name: getattr(model, name) for name in names}


def convert_denoiser(args: argparse.Namespace) -> None:
    """Reads an official denoiser's file into our format."""
    family = DENOISERS[args.family]
    state = strip_prefix(read_state(args.source, args.entry), family.prefix)
    model = family.infer(state, **{name: getattr(args, name) for name in family.options})
    params = torch_to_flax(state, family.rules(model))
    save_converted(
        args.out,
        params,
        {
            "family": args.family,
            "model": model_sizes(model),
            "entry": args.entry,
            **source_record(args.source),
        },
    )
    kind, count = type(model).__name__, count_params(params)
    print(f"{args.source}: {kind} with {count:,} parameters -> {args.out}")


def export_denoiser(params: Params, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The original's state dict of a converted denoiser.

    Raises:
      ConversionError: If it has what the original lacks.
    """
    family = DENOISERS[record["family"]]
    model = family.model(**record["model"])
    if model.register_gate:
        raise ConversionError(
            "this denoiser's registers are behind a gate, which the original does not have",
            "train with config.registers.gate=False to export, or take the registers away with "
            "tools/add_registers.py --ablate",
        )
    state = flax_to_torch(params, family.rules(model)) | family.constants(model)
    return {family.prefix + name: value for name, value in state.items()}


def strip_prefix(state: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The names without what a wrapper put before them, where it did so before all."""
    if not all(name.startswith(prefix) for name in state):
        return dict(state)
    return {name.removeprefix(prefix): value for name, value in state.items()}


def add_denoiser_commands(families: Any) -> None:
    """Adds a command for each denoiser to the subparsers."""
    for name, family in DENOISERS.items():
        parser = families.add_parser(name, help=family.help)
        parser.add_argument("--source", required=True, help="ep-*.pt or a safetensors file")
        parser.add_argument("--out", required=True, help="new folder")
        parser.add_argument(
            "--entry", help=f"state dict inside the file; default {family.entries[0]}, else model"
        )
        for option in family.options:
            default, explanation = _OPTIONS[option]
            flag = f"--{option.replace('_', '-')}"
            parser.add_argument(flag, type=int, default=default, help=explanation)
        parser.set_defaults(run=convert_denoiser, family=name)
