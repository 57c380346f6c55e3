"""Captioned images in files: jsonl with paths of images, or a folder of image and text pairs.

Source: spec t2i 7.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dsr_jax.core.errors import DataError, PromptError, UnreadableRecord
from dsr_jax.core.images import find_image_files, read_file
from dsr_jax.data.base import SourceOptions
from dsr_jax.data.classes import fingerprint
from dsr_jax.data.conversations import Caption, parse_caption, parse_record, settle_problems
from dsr_jax.data.images import decode_image, fit_name


class JsonlCaptions:
    """Images and captions that the lines of a jsonl file name.

    Every line is checked when the file is opened: it must be a record of `data.conversations` whose
    "image" exists. Empty lines are left out.

    Args:
      options: `root` is the file, to which paths of images are relative; size, channels and `fit`
        of the images; `on_corrupt`.

    Attributes:
      skipped: Number of lines that were left out.

    Raises:
      DataError: If the file cannot be read, or naming the lines that cannot be used.
    """

    def __init__(self, options: SourceOptions) -> None:
        options.require_gray_or_rgb("jsonl")
        self._path = Path(options.require_root("jsonl"))
        self.name, self.image_shape = f"jsonl {self._path}", options.image_shape
        self._fit = fit_name(options.fit)
        entries, problems = [], []
        offset, exists = 0, _file_finder()
        try:
            with open(self._path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        try:
                            self._check(line, exists)
                            entries.append((number, offset, len(line)))
                        except PromptError as error:
                            problems.append(f"line {number} {error.problem}")
                    offset += len(line)
        except OSError as error:
            raise DataError(
                f"caption file {self._path} cannot be read: {error.strerror or error}",
                "set config.data.root to a jsonl file",
            ) from error
        self._entries = np.array(entries, np.int64).reshape(-1, 3)
        self.skipped = len(problems)
        settle_problems(self.name, problems, len(entries), options.on_corrupt)
        self.fingerprint = fingerprint([str(offset), *(f"{a} {b}" for _, a, b in entries)])

    def _check(self, line: bytes, exists: Callable[[Path], bool]) -> None:
        _, images = parse_record(line)
        if not images:
            raise PromptError("names no image")
        if not exists(self._path.parent / images[0]):
            raise PromptError(f"names {images[0]}, which does not exist")

    def __len__(self) -> int:
        return len(self._entries)

    def _read(self, index: int) -> tuple[Caption, Path]:
        _, offset, size = (int(value) for value in self._entries[index])
        try:
            with open(self._path, "rb") as file:
                file.seek(offset)
                caption, images = parse_record(file.read(size))
        except (OSError, PromptError) as error:
            raise DataError(
                f"{self.origin(index)} cannot be read: {error}",
                "leave the file as it is while a run reads it",
            ) from error
        return caption, self._path.parent / images[0]

    def caption(self, index: int) -> Caption:
        return self._read(index)[0]

    def image(self, index: int) -> np.ndarray:
        size, _, channels = self.image_shape
        path = self._read(index)[1]
        origin = f"{path}, {self.origin(index)}"
        return decode_image(read_file(path), origin, size, channels, fit=self._fit)

    def origin(self, index: int) -> str:
        return f"line {self._entries[index, 0]} of {self._path}"


class CaptionFolder:
    """Images below a folder, each with its caption in a text file of the same name.

    Args:
      options: `root` is the folder; size, channels and `fit` of the images; `on_corrupt`.

    Attributes:
      skipped: Number of images and captions that were left out.

    Raises:
      DataError: If the folder cannot be read, or naming the files that have no counterpart.
    """

    def __init__(self, options: SourceOptions) -> None:
        options.require_gray_or_rgb("captions")
        self._root = Path(options.require_root("captions"))
        if not self._root.is_dir():
            raise DataError(f"data folder {self._root} does not exist", "set config.data.root")
        self.name, self.image_shape = f"captions {self._root}", options.image_shape
        self._fit = fit_name(options.fit)
        images = find_image_files(self._root)
        stems = {os.path.splitext(path)[0] for path in images}
        exists = _file_finder()
        self._files = [path for path in images if exists(self._text(path))]
        captioned = set(self._files)
        problems = [f"{path} has no caption file" for path in images if path not in captioned]
        problems += [
            f"{path.relative_to(self._root)} has no image"
            for path in sorted(self._root.rglob("*.txt"))
            if str(path.relative_to(self._root))[:-4] not in stems
        ]
        self.skipped = len(problems)
        settle_problems(self.name, problems, len(self._files), options.on_corrupt)
        self.fingerprint = fingerprint(self._files)

    def _text(self, path: str) -> Path:
        return (self._root / path).with_suffix(".txt")

    def __len__(self) -> int:
        return len(self._files)

    def caption(self, index: int) -> str:
        """Reads a caption.

        Raises:
          UnreadableRecord: If it is empty or no UTF-8 text.
        """
        path = self._text(self._files[index])
        try:
            return parse_caption(read_file(path).decode())
        except (PromptError, UnicodeDecodeError) as error:
            problem = error.problem if isinstance(error, PromptError) else "it is no UTF-8 text"
            raise UnreadableRecord(
                f"{path}: {problem}", "repair it, or set config.data.on_corrupt=skip"
            ) from error

    def image(self, index: int) -> np.ndarray:
        size, _, channels = self.image_shape
        content = read_file(self._root / self._files[index])
        return decode_image(content, self.origin(index), size, channels, fit=self._fit)

    def origin(self, index: int) -> str:
        return str(self._root / self._files[index])


def _file_finder() -> Callable[[Path], bool]:
    """Returns a test of whether a file exists, which lists every folder once.

    A call to the file system per file would take hours on a network disk.
    """

    @functools.lru_cache(maxsize=4096)
    def listing(folder: Path) -> frozenset[str]:
        try:
            return frozenset(os.listdir(folder))
        except OSError:
            return frozenset()

    return lambda path: path.name in listing(path.parent)
