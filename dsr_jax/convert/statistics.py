"""Files of latent statistics: the official `.pt` with [C, h, w], and ours with [h, w, C].

Source: RAE and DSR stage1/rae.py (normalization_stat_path); spec encoder 3, "Statistics file".
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsr_jax.convert.files import check_new_file
from dsr_jax.convert.readers import read_state
from dsr_jax.convert.tensors import write_safetensors
from dsr_jax.convert.torch_files import save_torch
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.files import open_atomic

FILE = "statistics.safetensors"
_NAMES = ("mean", "var")
_TORCH = (".pt", ".pth")


def load_statistics(path: str | Path) -> dict[str, np.ndarray]:
    """Reads "mean" and "var" of latents, each [h, w, C], float32.

    Args:
      path: A `.safetensors` file of ours, a folder that holds one, or an official `.pt` or `.pth`.
        In the latter a mean that is missing counts as 0, a variance as 1.

    Raises:
      ConversionError: If the file is missing, damaged, or holds something else.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE
    state = read_state(path)
    if unknown := sorted(set(state) - set(_NAMES)):
        raise ConversionError(
            f"{path} holds {', '.join(unknown[:8])}, which is not part of statistics",
            f"statistics hold {' and '.join(_NAMES)} only",
        )
    known = next(iter(state.values()))
    fills = {"mean": 0.0, "var": 1.0}
    found = {name: state.get(name, np.full_like(known, fills[name])) for name in _NAMES}
    shapes = {name: found[name].shape for name in _NAMES}
    if known.ndim != 3 or shapes["mean"] != shapes["var"]:
        raise ConversionError(
            f"{path} holds statistics of shapes {shapes}", "each has 3 dimensions, both the same"
        )
    if not all(np.isfinite(x).all() for x in found.values()) or (found["var"] < 0).any():
        raise ConversionError(
            f"{path} holds a variance below 0, or values that are not finite",
            "make it again with python -m dsr_jax.encode statistics",
        )
    official = path.suffix in _TORCH
    return {
        name: np.ascontiguousarray(np.moveaxis(x, 0, -1) if official else x, np.float32)
        for name, x in found.items()
    }


def save_statistics(path: str | Path, statistics: Mapping[str, np.ndarray]) -> None:
    """Writes statistics [h, w, C], in the official form where `path` ends in `.pt`.

    Raises:
      ConversionError: If the ending is another, or torch is needed and missing.
    """
    path = Path(path)
    arrays = {name: np.asarray(statistics[name], np.float32) for name in _NAMES}
    if path.suffix == ".safetensors":
        with open_atomic(path) as file:
            write_safetensors(file, arrays)
    elif path.suffix in _TORCH:
        save_torch(path, {name: np.moveaxis(x, -1, 0) for name, x in arrays.items()})
    else:
        raise ConversionError(
            f"statistics cannot be written to {path}", "name a .safetensors or .pt file"
        )


def convert_statistics(args: argparse.Namespace) -> None:
    """Copies statistics from one form to the other."""
    out = Path(args.out)
    check_new_file(out)
    statistics = load_statistics(args.source)
    save_statistics(out, statistics)
    print(f"{args.source}: statistics of latents {statistics['mean'].shape} -> {out}")


def add_statistics_command(families: Any) -> None:
    """Adds the statistics to the command line's families (argparse subparsers)."""
    parser = families.add_parser("statistics", help="mean and variance of latents, either way")
    parser.add_argument("--source", required=True, help=".pt or .safetensors file")
    parser.add_argument("--out", required=True, help="new .safetensors or .pt file")
    parser.set_defaults(run=convert_statistics)
