"""State dicts from files: safetensors without torch, `.pt` files without pickled code."""

import argparse
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsr_jax.core.errors import ConversionError

_WRAPPERS = ("module.", "_orig_mod.")


def read_state(source: str | os.PathLike[str], entry: str | None = None) -> dict[str, np.ndarray]:
    """Reads a state dict.

    Args:
      source: A `.safetensors` file, a snapshot folder that holds one (or several with an index),
        or a torch file.
      entry: Of a torch file that holds several state dicts ("ema", "model"); None takes "ema" if
        there is one, or JiT's "model_ema1", else "model", else the file itself.

    Returns:
      Arrays by name, without the prefixes that DDP and torch.compile add.

    Raises:
      ConversionError: If the source is missing, damaged, would run code, or lacks the entry.
    """
    path = Path(source)
    if not path.exists():
        raise ConversionError(f"{path} does not exist", "give a file or a snapshot folder")
    if path.is_dir() or path.suffix == ".safetensors":
        if entry is not None:
            raise ConversionError(
                f"{path} has no entry {entry!r}: safetensors files hold one state dict",
                "leave the entry out",
            )
        state = _read_snapshot(path) if path.is_dir() else _read_safetensors(path)
    else:
        state = _read_torch(path, entry)
    if not state:
        raise ConversionError(f"{path} holds no tensors", "give a file of weights")
    return _strip(path, state)


def shape_of(state: Mapping[str, np.ndarray], name: str, ndim: int, remedy: str) -> tuple[int, ...]:
    """Returns the shape of a tensor that tells a size.

    Args:
      state: Arrays by name.
      name: Of the tensor.
      ndim: How many dimensions it must have.
      remedy: What to do where it does not.

    Raises:
      ConversionError: If it is missing or has another number of dimensions.
    """
    if name not in state or state[name].ndim != ndim:
        found = list(state[name].shape) if name in state else "absent"
        raise ConversionError(f"{name} is {found}", remedy)
    return state[name].shape


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConversionError(
            f"{path} cannot be read as safetensors: {error}", "it is incomplete; copy it again"
        ) from error


def _read_snapshot(folder: Path) -> dict[str, np.ndarray]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        torch_files = sorted(path.name for path in folder.glob("*.bin"))
        if not names and len(torch_files) == 1:
            return _read_torch(folder / torch_files[0], None)
        if len(names) != 1:
            raise ConversionError(
                f"{folder} holds {names or 'no .safetensors file'}", "name the one file to read"
            )
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise ConversionError(f"{folder} lacks {absent}, which its index names", "copy them, too")
    state: dict[str, np.ndarray] = {}
    for name in names:
        state |= _read_safetensors(folder / name)
    return state


def _read_torch(path: Path, entry: str | None) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise ConversionError(
            f"reading {path} needs torch", "pip install 'dsr_jax[torch]', or use safetensors"
        ) from error
    try:
        # SiT and JiT store their command line beside the weights; a Namespace runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path} is refused: {str(error).splitlines()[0]}",
            "only tensors and plain values are read, never pickled code; save it again without the "
            "other objects",
        ) from error
    except Exception as error:  # noqa: BLE001  torch meets a damaged file with any of a dozen
        raise ConversionError(
            f"{path} cannot be read: {type(error).__name__} {error}".splitlines()[0],
            "it is incomplete; copy it again",
        ) from error
    tensors = {
        name: _to_numpy(value)
        for name, value in _choose_entry(path, content, entry).items()
        if isinstance(value, torch.Tensor)
    }
    if not tensors and (names := _entries(content)):
        raise ConversionError(
            f"{path} holds no tensors at its top, but entries {', '.join(names)}",
            "name one with --entry",
        )
    return tensors


def _choose_entry(path: Path, content: Any, entry: str | None) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise ConversionError(f"{path} holds a {type(content).__name__}", "give a state dict")
    entries = _entries(content)
    if entry is None:
        entry = next((name for name in ("ema", "model_ema1", "model") if name in entries), None)
        return content if entry is None else content[entry]
    if entry not in entries:
        raise ConversionError(
            f"{path} has no entry {entry!r}",
            f"entries are {', '.join(entries) or 'none: it is a bare state dict'}",
        )
    return content[entry]


def _entries(content: Mapping[Any, Any]) -> list[str]:
    return [str(key) for key, value in content.items() if isinstance(value, Mapping)]


def _to_numpy(tensor: Any) -> np.ndarray:
    """A CPU tensor's values; NumPy has no bfloat16, and float32 holds it exactly."""
    tensor = tensor.detach()
    if str(tensor.dtype) == "torch.bfloat16":
        tensor = tensor.float()
    return tensor.numpy()


def _strip(path: Path, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    stripped: dict[str, np.ndarray] = {}
    for full_name, value in state.items():
        name = full_name
        while name.startswith(_WRAPPERS):
            name = name.split(".", 1)[1]
        if name in stripped:
            raise ConversionError(
                f"{path} holds {name} twice, with and without a prefix of {', '.join(_WRAPPERS)}",
                "save the weights of one model only",
            )
        stripped[name] = value
    return stripped
