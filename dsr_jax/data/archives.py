"""Image files inside tar files, as ILSVRC distributes ImageNet, read without unpacking."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

from dsr_jax.core.errors import DataError
from dsr_jax.core.images import EXTENSIONS, is_hidden
from dsr_jax.data.class_map import labels_of, names_by_label


class _Entry(NamedTuple):
    """Name, offset and size in bytes of one file in the archive."""

    name: str
    offset: int
    size: int


class ImageTar:
    """The images of `ILSVRC2012_img_train.tar` or `ILSVRC2012_img_val.tar`, without unpacking.

    A training archive holds one tar file per class, whose sorted names have the labels 0, 1, ... A
    validation archive holds the images themselves, whose classes are in another file.

    Args:
      path: The archive.
      classes: Class name by name of the image file, for an archive of images.
      class_map: File that sets the labels, see `class_map.read_class_map`; "" for the order of
        strings.

    Attributes:
      name: Name in logs.
      class_names: Class name by label.

    Raises:
      DataError: If the archive is missing or damaged, is of another layout, or classes are missing.
    """

    def __init__(
        self, path: str | Path, classes: Mapping[str, str] | None = None, class_map: str = ""
    ) -> None:
        self._path, self.name = Path(path), f"tar {path}"
        try:
            with open(self._path, "rb") as file:
                found = list(_images_by_class(file, classes))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        except tarfile.TarError as error:
            raise DataError(
                f"{path} is not a whole tar file: {error}",
                "compare its size and checksum with those of its origin, and copy it again",
            ) from error
        if not found:
            raise DataError(f"{path} holds no images", "name ILSVRC2012's training or val archive")
        labels = labels_of([*{name for name, _ in found}], class_map)
        self.class_names = names_by_label(labels)
        self._entries = sorted((labels[name], entry) for name, entry in found)

    def __len__(self) -> int:
        return len(self._entries)

    def encoded(self, index: int) -> tuple[bytes, int]:
        """Returns content of the file and label of record `index`."""
        label, entry = self._entries[index]
        with open(self._path, "rb") as file:
            file.seek(entry.offset)
            return file.read(entry.size), label

    def origin(self, index: int) -> str:
        """Returns the name of record `index` for errors."""
        return f"{self._entries[index][1].name} in {self._path}"


def read_classes(path: str | Path) -> dict[str, str]:
    """Reads lines "FILE CLASS", such as "ILSVRC2012_val_00000001.JPEG n01751748".

    Raises:
      DataError: If the file cannot be read, or naming the first line of another form.
    """
    remedy = "write one line FILE CLASS per image"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"class list {path} cannot be read: {error}", remedy) from error
    classes = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2:
            raise DataError(f"{path}, line {number}: {line[:60]!r}", remedy)
        classes[words[0]] = words[1]
    return classes


def _images_by_class(
    file: IO[bytes], classes: Mapping[str, str] | None
) -> Iterator[tuple[str, _Entry]]:
    for name, entry, content in _members(file):
        if is_hidden(name):
            continue
        if name.endswith(".tar"):
            for inner, part, _ in _members(content):
                if inner.lower().endswith(EXTENSIONS) and not is_hidden(inner):
                    yield Path(name).stem, _Entry(inner, entry.offset + part.offset, part.size)
        elif name.lower().endswith(EXTENSIONS):
            if classes is None or name not in classes:
                raise DataError(
                    f"the class of {name} is not known",
                    "an archive of images needs --classes=FILE with lines FILE CLASS",
                )
            yield classes[name], entry


def _members(file: IO[bytes]) -> Iterator[tuple[str, _Entry, IO[bytes]]]:
    """Yields base name, position and content of the files in a tar file."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None:
                name = Path(member.name).name
                yield name, _Entry(name, member.offset_data, member.size), content
