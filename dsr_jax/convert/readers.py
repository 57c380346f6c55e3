"""Reads state dicts from user files: safetensors, torch files, folders of either."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsr_jax.convert.names import drop, split_networks, unwrap
from dsr_jax.convert.tensors import map_safetensors
from dsr_jax.convert.torch_files import describe_text, load_torch, to_numpy
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.files import read_json

_ENTRIES = (
    "ema",
    "model_ema1",
    "model_ema",
    "ema_model",
    "ema_state_dict",
    "state_dict_ema",
    "model",
    "state_dict",
    "model_state_dict",
    "module",
)
"""State dicts of a torch file in the order in which they are looked for; EMA weights first."""

_INDEX = ".index.json"
_MAIN_FILES = ("model", "diffusion_pytorch_model", "pytorch_model")
"""Names that transformers and diffusers give to a folder's weights."""


class Source(NamedTuple):
    """Opened state dict.

    Attributes:
      state: Arrays by name, read-only, mapped from the file where its format allows.
      entry: Name of the state dict in the file; None for the only one.
    """

    state: dict[str, np.ndarray]
    entry: str | None


def read_state(source: str | os.PathLike[str], entry: str | None = None) -> dict[str, np.ndarray]:
    """Returns the arrays that `open_source` opens."""
    return open_source(source, entry).state


def open_source(
    source: str | os.PathLike[str], entry: str | None = None, dropped: Sequence[str] = ()
) -> Source:
    """Opens a state dict, under names without those that training wrappers add.

    Args:
      source: A `.safetensors` file, a torch file, an index of shards, or a folder that holds one of
        them.
      entry: Which state dict of a file that holds several ("ema", "model"); None takes the EMA
        weights where there are any.
      dropped: Patterns of names to leave out.

    Raises:
      ConversionError: If the source is missing, damaged, would run code, or lacks the entry.
    """
    path = Path(source)
    if not path.exists():
        raise ConversionError(f"{path} does not exist", "give a file or a snapshot folder")
    found = _read_folder(path) if path.is_dir() else _read_file(path)
    order = (entry, *_ENTRIES) if entry else _ENTRIES
    chosen = next((name for name in order if name in found), None)
    arrays = _to_arrays(found[chosen])
    if not arrays:
        names = [name for name in found if name is not None and name != chosen]
        raise ConversionError(
            f"{path} holds no tensors"
            + (f" at its top, but entries {', '.join(names)}" * bool(names)),
            "name one with --entry" if names else "give a file of weights",
        )
    state = unwrap(str(path), arrays)
    networks = split_networks(state)
    if entry is not None and entry != chosen and entry not in networks:
        raise _no_entry(path, entry, [*(name for name in found if name), *networks])
    if networks:
        attribute = entry if entry in networks else next(iter(networks))
        state = networks[attribute]
        chosen = f"{chosen}.{attribute}" if chosen else attribute
    return Source(drop(state, dropped, str(path)), chosen)


def _no_entry(path: Path, entry: str, names: Sequence[str]) -> ConversionError:
    if names:
        remedy = f"entries are {', '.join(names)}"
    else:
        remedy = "leave the entry out: it is a bare state dict"
    return ConversionError(f"{path} has no entry {entry!r}", remedy)


def shape_of(state: Mapping[str, np.ndarray], name: str, ndim: int, remedy: str) -> tuple[int, ...]:
    """Returns the shape of a tensor that a size is read off.

    Args:
      state: Arrays by name.
      name: Name of the tensor.
      ndim: Required number of dimensions.
      remedy: Remedy of the error.

    Raises:
      ConversionError: If it is missing or has another number of dimensions.
    """
    if name not in state or state[name].ndim != ndim:
        found = list(state[name].shape) if name in state else "absent"
        raise ConversionError(f"{name} is {found}", remedy)
    return state[name].shape


def _read_file(path: Path) -> dict[str | None, Mapping[Any, Any]]:
    """Returns the state dicts of a file by entry, under None the tensors at its top."""
    if path.name.endswith(_INDEX):
        return {None: _read_shards(path)}
    if text := describe_text(path):
        raise ConversionError(f"{path} is {text}", _DOWNLOAD)
    if path.suffix == ".safetensors":
        return {None: map_safetensors(path)}
    content = load_torch(path)
    if not isinstance(content, Mapping):
        raise ConversionError(f"{path} holds a {type(content).__name__}", "give a state dict")
    found: dict[str | None, Mapping[Any, Any]] = {None: content}
    return found | {str(key): value for key, value in content.items() if isinstance(value, Mapping)}


_DOWNLOAD = (
    "the download did not fetch the file: use `hf download`, `git lfs pull` or the link that the "
    "page itself offers, and look at the file's size"
)


def _read_folder(folder: Path) -> dict[str | None, Mapping[Any, Any]]:
    """Returns the state dicts of a folder's one file of weights."""
    for suffix in (".safetensors", ".bin"):
        indices = _main_first(folder, f"{suffix}{_INDEX}")
        names = _main_first(folder, suffix)
        if indices and not any(f"{stem}{suffix}" in names for stem in _MAIN_FILES):
            return _read_file(folder / _only(folder, indices))
        if names:
            return _read_file(folder / _only(folder, names))
    raise ConversionError(
        f"{folder} holds no .safetensors or .bin file", "name the file of weights itself"
    )


def _main_first(folder: Path, ending: str) -> list[str]:
    """Returns the names of files with this ending; the only one where it has a standard name."""
    names = sorted(path.name for path in folder.glob(f"*{ending}"))
    standard = [name for name in names if name.removesuffix(ending) in _MAIN_FILES]
    return standard or names


def _only(folder: Path, names: Sequence[str]) -> str:
    if len(names) != 1:
        raise ConversionError(f"{folder} holds {list(names)}", "name the one file to read")
    return names[0]


def _read_shards(index: Path) -> dict[str, Any]:
    """Returns the tensors of all files that an index names."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("a shard is not in the folder")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConversionError(
            f"{index} is no index of shards: {type(error).__name__} {error}", "copy it again"
        ) from error
    if absent := [name for name in names if not os.path.isfile(index.parent / name)]:
        raise ConversionError(
            f"{index.parent} lacks {absent}, which its index names", "copy them, too"
        )
    tensors: dict[str, Any] = {}
    for name in names:
        tensors |= _read_file(index.parent / name)[None]
    return tensors


def _to_arrays(tensors: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    """Returns the tensors of a mapping as arrays; its other values are left out."""
    arrays: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        if isinstance(value, np.ndarray):
            arrays[str(name)] = value
        elif hasattr(value, "detach"):
            arrays[str(name)] = to_numpy(str(name), value)
    return arrays
