"""Converted models on disk: `params.safetensors` and `conversion.json` in one folder."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsr_jax.convert.tensors import LazyArray, write_safetensors
from dsr_jax.convert.torch_files import save_torch
from dsr_jax.core.cli import leave
from dsr_jax.core.errors import ConversionError, DamagedFileError
from dsr_jax.core.files import (
    file_digest,
    leftovers,
    open_atomic,
    read_object,
    remove_leftovers,
    write_json,
)
from dsr_jax.core.lock import FolderLock, is_lock
from dsr_jax.core.secrets import hide_secrets
from dsr_jax.core.trees import flatten_names, unflatten_names

_PARAMS, _RECORD = "params.safetensors", "conversion.json"


def save_converted(
    folder: str | os.PathLike[str], params: Mapping[str, Any], record: Mapping[str, Any]
) -> None:
    """Writes a parameter tree and what it came from; nothing is overwritten.

    Args:
      folder: A new or empty folder.
      params: The tree, of arrays or `LazyArray`s, which are written piece by piece.
      record: JSON values: family, model sizes, source and its digest.

    Raises:
      ConversionError: If the folder is not empty.
      LockError: If another command writes there.
      StorageError: If the files cannot be written.
    """
    folder = Path(folder)
    flat = {
        name: leaf if isinstance(leaf, LazyArray) else np.asarray(leaf)
        for name, leaf in flatten_names(params).items()
    }
    with FolderLock(folder, lost=leave):
        check_new_folder(folder)
        remove_leftovers(folder)
        with open_atomic(folder / _PARAMS) as file:
            write_safetensors(file, flat)
            written: Any = file
            written.seek(0)
            digest = "sha256:" + hashlib.file_digest(written, "sha256").hexdigest()
            # Before the weights get their name: a killed command leaves a record alone at most.
            write_json(folder / _RECORD, {**record, "params_digest": digest})


def check_new_folder(folder: str | os.PathLike[str]) -> None:
    """Checks that a folder for a converted model is new or empty, but for what a kill has left.

    Raises:
      ConversionError: If it is not.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir() or _foreign_names(folder) not in (set(), {_RECORD}):
        raise ConversionError(
            f"{folder} is not an empty folder", "name a new folder; nothing was written"
        )


def _foreign_names(folder: Path) -> set[str]:
    """Returns the names in a folder except locks and the temporary files of killed commands."""
    ours = {path.name for path in leftovers(folder)}
    return {p.name for p in folder.iterdir() if p.name not in ours and not is_lock(p.name)}


def load_converted(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what `save_converted` wrote: the parameter tree and the record.

    Raises:
      ConversionError: If the folder holds no converted model, or a damaged one.
    """
    from safetensors.numpy import load_file

    folder = Path(folder)
    if absent := [name for name in (_RECORD, _PARAMS) if not (folder / name).is_file()]:
        raise ConversionError(
            f"{folder} holds no converted model: {' and '.join(absent)} missing",
            "make one with python -m dsr_jax.convert",
        )
    record = read_conversion(folder)
    if file_digest(folder / _PARAMS) != record["params_digest"]:
        raise ConversionError(
            f"{folder / _PARAMS} is not what was written", "convert again into a new folder"
        )
    return unflatten_names(load_file(folder / _PARAMS)), record


def read_conversion(folder: str | os.PathLike[str], keys: Sequence[str] = ()) -> dict[str, Any]:
    """Reads the conversion.json of a converted folder.

    Args:
      folder: The folder.
      keys: Entries that it must have, besides the digest.

    Raises:
      ConversionError: If it is missing.
      DamagedFileError: If it holds anything else.
    """
    path, remedy = Path(folder) / _RECORD, "convert again into a new folder"
    if not path.is_file():
        raise ConversionError(
            f"{folder} holds no converted model: {_RECORD} is missing",
            "make one with python -m dsr_jax.convert",
        )
    record = read_object(path, remedy)
    kinds = {"params_digest": str, "family": str, "model": dict}
    for key, kind in kinds.items():
        if not isinstance(record.get(key, kind()), kind):
            raise DamagedFileError(f"{path} is damaged: {key} is {str(record[key])[:80]!r}", remedy)
    if absent := [key for key in ("params_digest", *keys) if key not in record]:
        raise DamagedFileError(f"{path} is damaged: it has no {absent[0]}", remedy)
    return record


def save_state(
    out: str | os.PathLike[str], state: Mapping[str, np.ndarray], entries: Sequence[str]
) -> None:
    """Writes a state dict under the original's names; nothing is overwritten.

    Args:
      out: A new `.safetensors` file, or a torch file under any other ending.
      state: The arrays.
      entries: Names under which a torch file holds them, () for the file as a whole.

    Raises:
      ConversionError: If the file is there, or torch is needed and missing.
    """
    out = Path(out)
    check_new_file(out)
    if out.suffix == ".safetensors":
        with open_atomic(out) as file:
            write_safetensors(file, state)
    else:
        save_torch(out, state, entries)


def check_new_file(out: str | os.PathLike[str]) -> None:
    """Checks that a file does not exist.

    Raises:
      ConversionError: If it does.
    """
    if Path(out).exists():
        raise ConversionError(f"{out} exists", "name a new file; nothing was written")


def source_record(source: str) -> dict[str, Any]:
    """Returns a conversion's record of its source: name, and digest if it is a file."""
    path = Path(source)
    return {
        "source": path.name if path.exists() else hide_secrets(source),
        "source_digest": file_digest(path) if path.is_file() else None,
    }
