"""Atomic writes, JSON files and digests of files."""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dsr_jax.core.errors import DamagedFileError

MAX_JSON_BYTES = 256 * 2**20

_TEMPORARY = ".tmp"
_LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}" + re.escape(_TEMPORARY))


@contextlib.contextmanager
def open_atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a binary file for writing, which is renamed to `path` only if the block succeeds.

    After a crash, and for concurrent readers, the file has either its old or its new content. The
    temporary file is in the same folder, since a rename is atomic only within one file system;
    `leftovers` finds the temporary files of killed processes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY
    )
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def leftovers(folder: str | os.PathLike[str]) -> list[Path]:
    """Lists the temporary files of interrupted `open_atomic` calls in a folder."""
    return [path for path in Path(folder).iterdir() if _LEFTOVER.fullmatch(path.name)]


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes a file atomically."""
    with open_atomic(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | os.PathLike[str], remedy: str = "") -> Any:
    """Reads a JSON file.

    Args:
      path: Path of the file.
      remedy: Remedy of the error if the file is damaged.

    Raises:
      DamagedFileError: If the file is not JSON, or larger than MAX_JSON_BYTES.
      OSError: If it cannot be read.
    """
    if os.path.getsize(path) > MAX_JSON_BYTES:
        raise DamagedFileError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB", remedy)
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}", remedy) from error


def file_digest(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of a file's content as "sha256:...", without loading it as a whole."""
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
