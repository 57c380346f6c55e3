"""Safetensors files mapped into memory and written piece by piece.

The library's own functions hold all tensors of a file in memory. Source: the format's description
in github.com/huggingface/safetensors.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from dsr_jax.core.errors import ConversionError

# In the order in which the library writes tensors, so that each stays aligned.
_DTYPES = {
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
    "C64": np.complex64,
    "F32": np.float32,
    "U32": np.uint32,
    "I32": np.int32,
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "U16": np.uint16,
    "I16": np.int16,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_ORDER = {np.dtype(dtype): number for number, dtype in enumerate(_DTYPES.values())}
_HEADER_MULTIPLE = 8
"""Bytes that the header's length is a multiple of."""


@dataclass(frozen=True)
class LazyArray:
    """An array that is computed piece by piece when it is read.

    Attributes:
      shape: Sizes of the axes.
      dtype: Type of an element.
      pieces: Yields arrays that, one after the other in C order, are the whole.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterator[np.ndarray]]

    def read(self) -> np.ndarray:
        """Returns the whole array."""
        whole = np.empty(self.shape, self.dtype)
        flat, end = whole.reshape(-1), 0
        for piece in self.pieces():
            start, end = end, end + piece.size
            flat[start:end] = piece.reshape(-1)
        return whole


def map_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Opens a file as read-only arrays, whose bytes are read from disk when they are used.

    Raises:
      ConversionError: If the file is damaged, or holds a type that NumPy lacks.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        # The library checks the header and the file's length.
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise ConversionError(
            f"{path} cannot be read as safetensors: {error}", "it is incomplete; copy it again"
        ) from error
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    if unknown := sorted({entry["dtype"] for entry in header.values()} - set(_DTYPES)):
        raise ConversionError(
            f"{path} holds tensors of type {', '.join(unknown)}",
            "save the weights in float32 or bfloat16",
        )
    start = 8 + length
    data: Any = b"" if path.stat().st_size == start else np.memmap(path, mode="r", offset=start)
    return {name: _view(data, entry) for name, entry in header.items()}


def _view(data: Any, entry: Mapping[str, Any]) -> np.ndarray:
    start, end = entry["data_offsets"]
    array = np.frombuffer(data[start:end], _DTYPES[entry["dtype"]])
    return array.reshape(entry["shape"])


def write_safetensors(file: BinaryIO, tensors: Mapping[str, np.ndarray | LazyArray]) -> None:
    """Writes tensors with no more than one piece of one of them in memory.

    The result is, byte for byte, what `safetensors.numpy.save` returns for the same arrays.
    """
    names = sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name))
    header, end = {}, 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_MULTIPLE)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        tensor = tensors[name]
        for piece in tensor.pieces() if isinstance(tensor, LazyArray) else (tensor,):
            file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
