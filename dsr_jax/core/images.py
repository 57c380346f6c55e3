"""Image files on disk: finding them in a folder, and decoding them to grayscale or RGB.

All readers of image files use this decoder, so that training, scoring, references and the register
search get the same pixels. It follows the reference implementations (Pillow's `convert("RGB")`)
wherever those keep the image's values:

    16 bits per channel   the high byte (value >> 8); Pillow's own conversion clips at 255
    1 bit                 0 and 255
    palette               its colors
    alpha, transparency   dropped, not composited: the stored colors remain
    CMYK, YCbCr           converted without a color profile
    color to grayscale    ITU-R 601-2 luma, as in Pillow
    EXIF orientation      not applied
    multiple frames       the first frame
    32-bit integer, float rejected, since their range is undefined
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import struct
import zlib
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import numpy as np

from dsr_jax.core.errors import DataError, UnreadableRecord

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Lower-case file extensions of images."""

MAX_PIXELS = 2**26
"""Largest image that is decoded or made by resizing, 8192 x 8192: 256 MiB in Pillow's RGB."""

# Names that file servers and archivers leave among data, apart from names that start with a dot.
_NOT_DATA = {
    *("@eaDir", "@__thumb", "#recycle", "#snapshot", "__MACOSX", "lost+found"),
    *("$RECYCLE.BIN", "System Volume Information"),
}


def is_hidden(name: str) -> bool:
    """Whether a name belongs to the file system or an archiver, such as `.DS_Store`, `@eaDir`."""
    return name.startswith(".") or name in _NOT_DATA


def find_image_files(root: str | os.PathLike[str]) -> list[str]:
    """Lists the image files below a folder.

    Excluded are hidden names (`is_hidden`), links to one of their parent folders, and anything but
    regular files, such as a FIFO. A broken link is listed, so that reading it fails.

    Args:
      root: Folder; links to files and folders in it are followed.

    Returns:
      Paths relative to `root`, sorted folder by folder.

    Raises:
      DataError: If a folder cannot be listed.
    """
    found: list[str] = []
    pending = [("", _parents(root))]
    while pending:
        prefix, parents = pending.pop()
        for entry in list_folder(os.path.join(root, prefix)):
            path = os.path.join(prefix, entry.name)
            identity = _folder_identity(entry)
            if identity is None:
                if entry.name.lower().endswith(EXTENSIONS) and _is_regular(entry):
                    found.append(path)
            elif identity not in parents:
                pending.append((path, parents | {identity}))
    return sorted(found, key=lambda path: PurePath(path).parts)


def find_folders(root: str | os.PathLike[str]) -> list[str]:
    """Lists the sorted names of the folders in a folder, with the rules of `find_image_files`.

    Raises:
      DataError: If the folder cannot be listed.
    """
    parents = {None, *_parents(root)}
    return sorted(e.name for e in list_folder(root) if _folder_identity(e) not in parents)


def list_folder(path: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """Lists the entries of a folder, except hidden names.

    Raises:
      DataError: If it cannot be listed.
    """
    try:
        with os.scandir(path) as entries:
            return [entry for entry in entries if not is_hidden(entry.name)]
    except OSError as error:
        raise DataError(
            f"folder {os.fspath(path)} cannot be listed: {error.strerror or error}",
            "check its permissions",
        ) from error


def _folder_identity(entry: os.DirEntry[str]) -> tuple[int, int] | None:
    """Returns device and inode of a folder or of a link to one; None for anything else."""
    if entry.is_file(follow_symlinks=False):
        return None  # Without a call to the file system.
    with contextlib.suppress(OSError):
        status = entry.stat()
        return (status.st_dev, status.st_ino) if stat.S_ISDIR(status.st_mode) else None
    return None


def _is_regular(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a regular file, a link to one, or a broken link."""
    if not entry.is_symlink():
        return entry.is_file(follow_symlinks=False)
    try:
        return stat.S_ISREG(os.stat(entry.path).st_mode)
    except FileNotFoundError:
        return True
    except OSError:
        return False  # The link leads to itself.


def _parents(root: str | os.PathLike[str]) -> frozenset[tuple[int, int]]:
    """Returns device and inode of a folder and of its parents."""
    path = Path(root).resolve()
    there = (folder.stat() for folder in (path, *path.parents) if folder.exists())
    return frozenset((status.st_dev, status.st_ino) for status in there)


def read_file(path: Path) -> bytes:
    """Reads a file.

    Raises:
      DataError: If the operating system cannot read it.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"image {path} cannot be read: {error.strerror or error}",
            "check that it was not moved during the run and that the disk is healthy",
        ) from error


def decode(data: bytes, origin: str, channels: int = 3) -> Image.Image:
    """Decodes an image file to mode RGB or L, by the rules in the module's docstring.

    Args:
      data: Content of the file, in any format that Pillow reads.
      origin: Path of the file, for error messages.
      channels: 3 for RGB, 1 for grayscale.

    Raises:
      UnreadableRecord: If the content is damaged, is not an image, or exceeds MAX_PIXELS.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            check_size(*image.size)
            image.load()
            return to_mode(image, channels)
    except Image.UnidentifiedImageError as error:
        raise unreadable(origin, ValueError("its image format is unknown")) from error
    # All of these are what Pillow's plugins raise on damaged files; none is a bug of ours.
    except (
        *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError),
        *(ArithmeticError, struct.error, zlib.error),
        *(Image.DecompressionBombError, Image.DecompressionBombWarning),
    ) as error:
        raise unreadable(origin, error) from error


def unreadable(origin: str, error: Exception) -> UnreadableRecord:
    """Returns the error about an image file that cannot be decoded."""
    return UnreadableRecord(
        f"image {origin} cannot be decoded: {str(error) or type(error).__name__}",
        "repair or delete it, or set config.data.on_corrupt=skip",
    )


def to_array(image: Image.Image) -> np.ndarray:
    """Returns the pixels of an image of mode L or RGB, uint8 [H, W, 1 or 3]."""
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def check_size(width: int, height: int) -> None:
    """Checks the number of pixels of an image before it is allocated.

    Raises:
      ValueError: If it has no pixels, or more than MAX_PIXELS.
    """
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels; 1 to {MAX_PIXELS:,} can be used")


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Converts an image of any mode to L or RGB, by the rules in the module's docstring.

    Raises:
      ValueError: If the pixels have no defined range.
    """
    from PIL import Image

    # Pillow reads 16-bit PGM files as 32-bit integers up to 65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixel mode {image.mode!r} has no defined range")
    if image.mode == "P" and "transparency" in image.info:
        # Pillow warns about a direct conversion to RGB.
        image = image.convert("RGBA")
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)
