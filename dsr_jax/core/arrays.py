"""Reading `.npy` and `.npz` files of unknown origin, with their sizes checked before allocation."""

import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from dsr_jax.core.errors import DamagedFileError

EXPANSION = 16
"""Largest factor by which an `.npz` may grow when it is unpacked."""

FREE_BYTES = 2**26
"""Size up to which any factor is allowed."""

READ_ERRORS = (
    *(ValueError, EOFError, LookupError, TypeError, SyntaxError, ArithmeticError, MemoryError),
    *(RecursionError, NotImplementedError, RuntimeError, AttributeError, OSError),
    *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError),
)
"""What NumPy and zipfile raise on damaged files: headers are Python literals, and archives name
positions and methods."""

_Result = TypeVar("_Result")


def read_array(path: str | os.PathLike[str], remedy: str = "") -> np.ndarray:
    """Reads an `.npy` file; Python objects are refused and never unpickled.

    Args:
      path: Path of the file.
      remedy: Remedy of the error if the file is damaged.

    Raises:
      DamagedFileError: If it is no whole file of one array.
      OSError: If it cannot be read.
    """

    def read(file: IO[bytes]) -> np.ndarray:
        return _read_member(file, os.fstat(file.fileno()).st_size)

    with open(path, "rb") as file:
        return _named(path, remedy, lambda: read(file))


def read_arrays(path: str | os.PathLike[str], remedy: str = "") -> dict[str, np.ndarray]:
    """Reads all arrays of an `.npz` file by name; as `read_array` otherwise.

    Raises:
      DamagedFileError: If it is no whole archive of arrays, or far larger when unpacked.
      OSError: If it cannot be read.
    """
    limit = max(FREE_BYTES, EXPANSION * os.path.getsize(path))

    def read() -> dict[str, np.ndarray]:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if (size := sum(info.file_size for info in members)) > limit:
                raise ValueError(f"unpacked, it would take {size:,} bytes")
            found = {}
            for info in members:
                with archive.open(info) as member:
                    found[info.filename.removesuffix(".npy")] = _read_member(member, info.file_size)
            return found

    return _named(path, remedy, read)


def _read_member(file: IO[bytes], size: int) -> np.ndarray:
    """Reads one array from a file or member of `size` bytes."""
    version = np.lib.format.read_magic(file)
    readers: dict[tuple[int, int], Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"npy version {version} is not 1.0 or 2.0")
    shape, fortran, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which could run code when read; refused")
    need = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or size - file.tell() != need:
        raise ValueError(f"{dtype}{shape} needs {need} bytes, but there are {size - file.tell()}")
    # A fresh buffer that the array may write to; the end is read so that checksums are compared.
    flat = np.frombuffer(bytearray(file.read()), dtype, count=math.prod(shape))
    return flat.reshape(shape, order="F" if fortran else "C")


def _named(path: str | os.PathLike[str], remedy: str, read: Callable[[], _Result]) -> _Result:
    """Turns errors of reading into one with the file's name."""
    try:
        return read()
    except (FileNotFoundError, PermissionError):
        raise
    except READ_ERRORS as error:
        problem = str(error) or type(error).__name__
        raise DamagedFileError(f"{Path(path)} is damaged: {problem}", remedy) from error
