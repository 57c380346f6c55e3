"""Files that are either whole or absent, and digests to name them by."""

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
    """Opens a binary file for writing that takes the name `path` only when the block succeeds.

    A reader, or a crash, sees the old content or the new, never a part. The temporary file is in
    the same folder, since a rename is atomic only within one file system; what a kill leaves of it
    is found by `leftovers`.
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
    """Lists the temporary files that killed writes of `open_atomic` left in a folder."""
    return [path for path in Path(folder).iterdir() if _LEFTOVER.fullmatch(path.name)]


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes a whole file through `open_atomic`."""
    with open_atomic(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | os.PathLike[str], remedy: str = "") -> Any:
    """Reads a JSON file.

    Args:
      path: The file.
      remedy: What to do if it is damaged.

    Raises:
      DamagedFileError: If it holds no JSON, or more than MAX_JSON_BYTES.
      OSError: If it cannot be read.
    """
    if os.path.getsize(path) > MAX_JSON_BYTES:
        raise DamagedFileError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB", remedy)
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}", remedy) from error


def file_digest(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of a file's bytes as "sha256:...", read in pieces."""
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
