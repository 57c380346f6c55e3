"""Frozen encoders from snapshots, hub ids and checkpoints of RAE, and from our own folders."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsr_jax.convert.commands import add_source_arguments, open_for
from dsr_jax.convert.encoders import (
    FAMILIES,
    config_from_hub,
    encoder_rules,
    pixel_statistics,
    take_encoder,
)
from dsr_jax.convert.fetch import fetch_snapshot
from dsr_jax.convert.files import load_converted, save_converted
from dsr_jax.convert.readers import read_state
from dsr_jax.convert.rules import lazy_params, torch_to_flax
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.files import name_damage, read_object
from dsr_jax.core.trees import count_params
from dsr_jax.core.typing import Params
from dsr_jax.models.vit import ViTConfig

_COPY = "copy the snapshot again"


def read_encoder(
    source: str | Path,
    *,
    config: str | Path | None = None,
    entry: str | None = None,
    class_output: bool = False,
) -> tuple[ViTConfig, Params]:
    """Reads an encoder's sizes and parameters.

    Args:
      source: Snapshot folder, hub id, or a file of weights: also a checkpoint of RAE, whose
        encoder is taken out.
      config: Folder or hub id whose config.json describes a bare file of weights.
      entry: State dict inside a torch file; default "ema", else "model".
      class_output: Keeps what the class token's output needs.

    Raises:
      ConversionError: If anything is missing, unknown or does not fit.
    """
    path = fetch_snapshot(str(source))
    sizes = _read_sizes(path, config, class_output)
    state = take_encoder(read_state(path, entry), sizes.family)
    return sizes, torch_to_flax(state, encoder_rules(sizes))


def _read_sizes(path: Path, config: str | Path | None, class_output: bool) -> ViTConfig:
    folder = path if path.is_dir() else path.parent
    if config is not None:
        folder = fetch_snapshot(str(config))
    if not (folder / "config.json").is_file():
        raise ConversionError(
            f"{folder} holds no config.json, which describes the encoder",
            "give --config with the encoder's snapshot folder or hub id",
        )
    record = read_object(folder / "config.json", _COPY)
    with name_damage(folder / "config.json", _COPY):
        sizes = config_from_hub(record)
    processor = folder / "preprocessor_config.json"
    if processor.is_file():
        with name_damage(processor, _COPY):
            statistics: dict[str, Any] = pixel_statistics(read_object(processor, _COPY))
        sizes = dataclasses.replace(sizes, **statistics)
    return dataclasses.replace(sizes, class_output=class_output)


def convert_encoder(args: argparse.Namespace) -> None:
    """Reads an encoder into our format."""
    opened = open_for(args, args.family)
    config = _read_sizes(opened.path, args.config, args.class_output)
    if config.family != FAMILIES[args.family]:
        raise ConversionError(
            f"{args.source} is of the family {config.family}, not {args.family}",
            f"use python -m dsr_jax.convert {names_of(config.family)}",
        )
    state = take_encoder(opened.state, config.family)
    params = lazy_params(state, encoder_rules(config))
    record = {"family": args.family, "model": dataclasses.asdict(config)}
    save_converted(args.out, params, {**record, **opened.record})
    print(f"{args.source}: {args.family} with {count_params(params):,} parameters -> {args.out}")


def names_of(family: str) -> str:
    """Returns the command's names of one of our families."""
    return " or ".join(name for name, ours in FAMILIES.items() if ours == family)


def load_encoder(folder: str | Path) -> tuple[ViTConfig, Params]:
    """Reads an encoder that was converted into a folder.

    Raises:
      ConversionError: If there is none, or a model of another kind.
    """
    params, record = load_converted(folder)
    if record["family"] not in FAMILIES:
        raise ConversionError(
            f"{folder} holds a {record['family']}, not an encoder",
            f"convert one of {', '.join(FAMILIES)}",
        )
    return config_of_record(record), params


def load_class_encoder(folder: str | Path) -> tuple[ViTConfig, Params, dict[str, Any]]:
    """Reads DINOv2 for scores: sizes, parameters and record.

    Raises:
      ConversionError: If there is none, or one that was converted without its class output.
    """
    config, params = load_encoder(folder)
    if not config.class_output:
        raise ConversionError(
            f"{folder} holds an encoder without its class output",
            "convert it again: python -m dsr_jax.convert dinov2 --class-output",
        )
    return config, params, load_converted(folder)[1]


def config_of_record(record: Mapping[str, Any]) -> ViTConfig:
    """Sizes and flags that a conversion of an encoder wrote down."""
    model: dict[str, Any] = record["model"]
    lists = {key: tuple(value) for key, value in model.items() if isinstance(value, list)}
    return ViTConfig(**{**model, **lists})


def add_encoder_commands(families: Any) -> None:
    """Adds the encoders to the command line's families (argparse subparsers)."""
    for family in FAMILIES:
        parser = families.add_parser(family, help="frozen encoder")
        add_source_arguments(parser, "snapshot folder, hub id, or a checkpoint of RAE")
        parser.add_argument("--config", help="snapshot or hub id that describes a bare file")
        parser.set_defaults(run=convert_encoder, family=family, class_output=False)
        if family == "dinov2":
            parser.add_argument(
                "--class-output",
                action="store_true",
                help="keep the class token's output, for Frechet distances",
            )
