"""Takes the permission to write from folders, also from root."""

import fcntl
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

_GET_FLAGS, _SET_FLAGS, _IMMUTABLE = 0x80086601, 0x40086602, 0x10
"""Linux's FS_IOC_GETFLAGS, FS_IOC_SETFLAGS and FS_IMMUTABLE_FL, which `chattr +i` sets."""


def deny_writing(folder: Path) -> None:
    """Makes a folder and those in it read-only: nothing in them can be made, renamed or removed.

    Permissions do not bind root, which sets the flag of `chattr +i` instead.

    Args:
      folder: The folder; processes may write to it meanwhile.

    Raises:
      OSError: If the file system has no such flag.
    """
    for each in _folders(folder):
        _set_writable(each, False)


def allow_writing(folder: Path) -> None:
    """Undoes `deny_writing`; a folder that is not there is left out."""
    for each in _folders(folder) if folder.is_dir() else ():
        _set_writable(each, True)


def why_not_deniable(folder: Path) -> str:
    """Returns why folders in `folder` cannot be made read-only; "" if they can."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        try:
            deny_writing(Path(name))
            (Path(name) / "file").touch()
        except PermissionError as error:
            return "" if error.filename else str(error)
        except OSError as error:
            return str(error)
        finally:
            allow_writing(Path(name))
    return "a file could be made in a read-only folder"


def _folders(folder: Path) -> Iterator[Path]:
    """Yields a folder, and then those in it: none can appear in one that was treated."""
    yield folder
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            try:
                yield from _folders(path)
            except FileNotFoundError:
                continue


def _set_writable(folder: Path, writable: bool) -> None:
    if os.geteuid() != 0:
        folder.chmod(0o755 if writable else 0o555)
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        flags = struct.unpack("l", fcntl.ioctl(handle, _GET_FLAGS, bytes(8)))[0]
        changed = flags & ~_IMMUTABLE if writable else flags | _IMMUTABLE
        if changed != flags:
            fcntl.ioctl(handle, _SET_FLAGS, struct.pack("l", changed))
    except OSError:
        # A file system without such flags has none to undo.
        if not writable:
            raise
    finally:
        os.close(handle)
