"""Atomic writes, JSON files and digests of files."""

import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dsr_jax.core.errors import DamagedFileError, DsrError, StorageError

MAX_JSON_BYTES = 256 * 2**20

FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS))
"""Numbers of the errors of storage that takes no more, which only writing meets."""

_TEMPORARY = ".tmp"
_LEFTOVER = re.compile(r"\.(.+)\.[a-z0-9_]{8}" + re.escape(_TEMPORARY))


@contextlib.contextmanager
def open_atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a binary file for writing, which is renamed to `path` only if the block succeeds.

    After a crash, and for concurrent readers, the file has either its old or its new content. The
    temporary file is in the same folder, since a rename is atomic only within one file system;
    `leftovers` finds the temporary files of killed processes. The file can be read back within the
    block.

    Raises:
      StorageError: If the file cannot be written, as on a full disk.
    """
    path = Path(path)
    with name_storage_errors(path), temporary_file(path) as temporary:
        with temporary.open("w+b") as file:
            yield file


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """Creates an empty file next to `path`, which is renamed to it only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        rename_synced(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def rename_synced(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Renames a finished file or folder once its content is on disk.

    Without this, a power cut may leave the new name with an empty file behind it.
    """
    source = Path(source)
    for path in [*source.rglob("*"), source] if source.is_dir() else [source]:
        _sync(path)
    os.replace(source, target)
    _sync(Path(target).parent)


def _sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems have no fsync of folders.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def name_storage_errors(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Turns the errors of storage that takes no more into one with the file's name.

    Args:
      path: File that the block writes; None for any, of which only a full disk is recognized.

    Raises:
      StorageError: In place of an `OSError`.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        denied = path is not None and error.errno in (errno.EACCES, errno.EPERM)
        if error.errno not in FULL and not denied:
            raise
        raise StorageError(
            f"{path or error.filename or 'a file'} cannot be written: {error.strerror or error}",
            "free space on the disk or make the folder writable, then run the same command again",
        ) from error


def leftovers(folder: str | os.PathLike[str], name: str = "") -> list[Path]:
    """Lists the temporary files of interrupted `open_atomic` calls in a folder.

    Args:
      folder: The folder.
      name: Name of the file that was being written; "" for any.
    """
    return [
        path
        for path in Path(folder).iterdir()
        if (found := _LEFTOVER.fullmatch(path.name)) and name in ("", found[1])
    ]


def remove_leftovers(folder: str | os.PathLike[str], name: str = "") -> None:
    """Removes what `leftovers` lists. The caller holds the lock on what it writes."""
    for path in leftovers(folder, name) if Path(folder).is_dir() else []:
        path.unlink(missing_ok=True)


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


@contextlib.contextmanager
def name_damage(path: str | os.PathLike[str], remedy: str) -> Iterator[None]:
    """Turns what Python raises on values of another form into an error with the file's name.

    Args:
      path: File that the values were read from.
      remedy: Remedy of the error.

    Raises:
      DamagedFileError: In place of errors that are no `DsrError`; to those the name is added.
    """
    try:
        yield
    except DsrError as error:
        if os.path.basename(path) in str(error):
            raise
        raise type(error)(f"{path}: {error.problem}", error.remedy or remedy) from error
    except (
        *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
        *(RecursionError, MemoryError),
    ) as error:
        problem = f"{type(error).__name__}: {error}"
        raise DamagedFileError(f"{path} is damaged: {problem}", remedy) from error


def read_object(path: str | os.PathLike[str], remedy: str = "") -> dict[str, Any]:
    """Reads a JSON file that holds an object; as `read_json` otherwise.

    Raises:
      DamagedFileError: If it holds anything else.
    """
    value = read_json(path, remedy)
    if not isinstance(value, dict):
        raise DamagedFileError(f"{path} is damaged: it holds no object", remedy)
    return value


def file_digest(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of a file's content as "sha256:...", without loading it as a whole."""
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
