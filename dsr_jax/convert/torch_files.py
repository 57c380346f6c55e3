"""PyTorch's files: read as tensors and plain values, never as pickled code; and written."""

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from dsr_jax.core.errors import ConversionError
from dsr_jax.core.files import open_atomic

_TERMINAL_CODE = re.compile(r"\x1b\[[0-9;]*m")
_UNSUPPORTED = re.compile(r"Unsupported (?:global: GLOBAL|class) ([\w.]+)")


def load_torch(path: Path) -> Any:
    """Reads what `torch.save` wrote; tensors are mapped into memory where the format allows.

    Raises:
      ConversionError: If torch is missing, the file is damaged, or it would run code.
    """
    torch = import_torch(f"reading {path}", "use safetensors")
    try:
        with torch.serialization.safe_globals(_harmless_globals()):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        raise _refusal(torch, path, error) from error
    except Exception as error:  # noqa: BLE001  torch meets a damaged file with any of a dozen
        raise ConversionError(
            f"{path} cannot be read: {type(error).__name__} {error}".splitlines()[0],
            "it is incomplete; copy it again",
        ) from error


def save_torch(path: Path, state: Mapping[str, np.ndarray], entries: Sequence[str] = ()) -> None:
    """Writes a state dict as `torch.save` does.

    Args:
      path: Path of the file.
      state: Arrays by name.
      entries: Names under which the file holds them; () makes them the whole file.

    Raises:
      ConversionError: If torch is missing.
    """
    torch = import_torch(f"writing {path}", "name a .safetensors file")
    tensors = {
        name: torch.from_numpy(np.require(x, requirements=("C", "W"))) for name, x in state.items()
    }
    with open_atomic(path) as file:
        torch.save(dict.fromkeys(entries, tensors) if entries else tensors, file)


def import_torch(purpose: str, otherwise: str) -> ModuleType:
    """Imports torch.

    Args:
      purpose: Use of PyTorch, for the error message.
      otherwise: Remedy without PyTorch.

    Raises:
      ConversionError: If it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ConversionError(
            f"{purpose} needs torch", f"pip install 'dsr_jax[torch]', or {otherwise}"
        ) from error
    return torch


def to_numpy(name: str, tensor: Any) -> np.ndarray:
    """Returns a CPU tensor's values without copying them; NumPy's missing types by ml_dtypes.

    Raises:
      ConversionError: If the tensor is sparse, quantized or without values.
    """
    import torch

    tensor = tensor.detach()
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ConversionError(
            f"{name} is a {'quantized' if tensor.is_quantized else 'sparse'} tensor of {kind}",
            "save the weights as plain float32 or bfloat16 tensors",
        )
    if tensor.is_meta:
        raise ConversionError(
            f"{name} is on PyTorch's meta device, without values", "save the weights themselves"
        )
    if hasattr(ml_dtypes, kind):
        dtype = np.dtype(getattr(ml_dtypes, kind))
        bits: np.ndarray = tensor.view(torch.int16 if dtype.itemsize == 2 else torch.uint8).numpy()
        return bits.view(dtype)
    array: np.ndarray = tensor.numpy()
    return array


def _harmless_globals() -> list[Any]:
    """Returns the globals that training scripts store with weights and that run no code.

    SiT and JiT store their command line, others a best score or a random state of NumPy's.
    """
    functions: list[Any] = [np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]]
    # NumPy 1 and 2 pickle them under different names.
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    named = [(f, f"{module}.{f.__name__}") for f in functions for module in modules]
    dtypes = [type(np.dtype(code)) for code in "?bhilqBHILQefdSU"]
    return [argparse.Namespace, np.ndarray, np.dtype, *named, *dtypes]


def _refusal(torch: ModuleType, path: Path, error: pickle.UnpicklingError) -> ConversionError:
    """Returns the error about a file whose pickle contains more than tensors and plain values."""
    message = _TERMINAL_CODE.sub("", str(error))
    try:
        with torch.serialization.safe_globals(_harmless_globals()):
            found = torch.serialization.get_unsafe_globals_in_checkpoint(os.fspath(path))
    except Exception:  # noqa: BLE001  only zip files list what they need
        found = []
    _, _, cause = message.partition("WeightsUnpickler error: ")
    found = found or _UNSUPPORTED.findall(message)
    if not found:
        reason = (cause or message).strip().splitlines() or ["no pickle of torch.save"]
        return ConversionError(
            f"{path} is refused: {reason[0]}",
            "it is damaged, or was not written with torch.save's own pickle protocol; copy it "
            "again, or save it again with the default protocol",
        )
    return ConversionError(
        f"{path} is refused: besides tensors it holds {', '.join(sorted(found))}, and reading such "
        "objects can run code",
        "only tensors and plain values are read, never pickled code; where the file was made, save "
        "its state dict alone: torch.save({'ema': ema.state_dict()}, FILE)",
    )


def describe_text(path: Path) -> str:
    """Names what a failed download left under a weights file's name: text or nothing; else ''."""
    with open(path, "rb") as file:
        content = file.read(256)
    if not content:
        return "an empty file"
    start = content.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the weights themselves"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, not weights"
    return ""
