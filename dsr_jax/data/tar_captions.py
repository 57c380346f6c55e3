"""Captioned images in webdataset tar shards, read at random without unpacking.

A sample is the members of one name: `X.json` or `X.txt` beside `X.png`, `X.jpg` or another image.
Each shard is scanned once; offsets and problems are kept in `SHARD.tar.index.npz` beside it, as
long as the shard's size and time stay the same.

Source: spec t2i 7.
"""

from __future__ import annotations

import json
import logging
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsr_jax.core.arrays import read_arrays
from dsr_jax.core.errors import DataError, DsrError, PromptError
from dsr_jax.core.files import open_atomic, read_json
from dsr_jax.core.images import EXTENSIONS, is_hidden
from dsr_jax.data.base import SourceOptions
from dsr_jax.data.classes import fingerprint
from dsr_jax.data.conversations import Caption, parse_caption, parse_record, settle_problems
from dsr_jax.data.images import decode_image, fit_name

FIELDS = ("caption", "caption_size", "is_json", "image", "image_size")
"""Columns of an index: offset and size of caption and image, and the caption's form."""
_THREADS = 8

_logger = logging.getLogger(__name__)


class ShardIndex(NamedTuple):
    """Samples of one shard: entries int64 [N, 5] in the order of `FIELDS`, and problems."""

    entries: np.ndarray
    problems: list[str]


class TarCaptions:
    """Samples of tar shards, in the order of shards and names.

    Args:
      options: `root` is a tar file, a folder of `*.tar`, or a manifest {"tars": [paths]}, whose
        paths are relative to it; size, channels and `fit` of the images; `on_corrupt`.

    Attributes:
      skipped: Number of samples that were left out.

    Raises:
      DataError: If a shard is missing or damaged, or a sample cannot be used, naming shard and
        sample.
    """

    def __init__(self, options: SourceOptions) -> None:
        options.require_gray_or_rgb("webdataset")
        root = Path(options.require_root("webdataset"))
        self.name = f"webdataset {root}"
        self.image_shape = options.image_shape
        self._fit = fit_name(options.fit)
        self._shards = find_shards(root)
        with ThreadPoolExecutor(_THREADS) as pool:
            indices = list(pool.map(read_index, self._shards))
        self._entries = np.concatenate([index.entries for index in indices])
        self._ends = np.cumsum([len(index.entries) for index in indices])
        problems = [
            f"{shard}: {problem}"
            for shard, index in zip(self._shards, indices, strict=True)
            for problem in index.problems
        ]
        self.skipped = len(problems)
        settle_problems(self.name, problems, len(self._entries), options.on_corrupt)
        sizes = [f"{path.name} {path.stat().st_size}" for path in self._shards]
        self.fingerprint = fingerprint([*sizes, str(len(self._entries))])

    def __len__(self) -> int:
        return len(self._entries)

    def _read(self, index: int, column: int) -> bytes:
        offset, size = (int(value) for value in self._entries[index, column : column + 2])
        path = self._shard(index)
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise DataError(
                f"{path} cannot be read: {error.strerror or error}",
                "check that it was not moved during the run and that the disk is healthy",
            ) from error

    def _shard(self, index: int) -> Path:
        return self._shards[int(np.searchsorted(self._ends, index, side="right"))]

    def caption(self, index: int) -> Caption:
        content = self._read(index, 0)
        if self._entries[index, 2]:
            return parse_record(content)[0]
        return parse_caption(content.decode(errors="replace"))

    def image(self, index: int) -> np.ndarray:
        size, _, channels = self.image_shape
        content = self._read(index, 3)
        return decode_image(content, self.origin(index), size, channels, fit=self._fit)

    def origin(self, index: int) -> str:
        return f"image at byte {self._entries[index, 3]} of {self._shard(index)}"


def find_shards(root: Path) -> list[Path]:
    """Returns the shards that a manifest, a folder or one tar file stands for.

    Raises:
      DataError: If there are none, or one is missing.
    """
    remedy = 'name a tar file, a folder of *.tar, or a manifest {"tars": [...]}'
    if root.suffix == ".json":
        manifest = read_json(root, remedy)
        names = manifest.get("tars") if isinstance(manifest, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f'{root} has no list of paths under "tars"', remedy)
        shards = [root.parent / name for name in names]
    elif root.is_dir():
        shards = sorted(root.glob("*.tar"))
    else:
        shards = [root]
    if missing := [path for path in shards if not path.is_file()]:
        raise DataError(
            f"{len(missing)} of {len(shards)} tar shards do not exist, the first {missing[0]}",
            remedy,
        )
    if not shards:
        raise DataError(f"{root} holds no tar shards", remedy)
    return shards


def read_index(path: Path) -> ShardIndex:
    """Returns the samples of a shard, from its index file if that is of this shard.

    Raises:
      DataError: If the shard is damaged.
    """
    status, stored = path.stat(), path.with_name(path.name + ".index.npz")
    stamp = np.array([status.st_size, status.st_mtime_ns])
    try:
        arrays = read_arrays(stored)
        if np.array_equal(arrays["stamp"], stamp):
            return ShardIndex(arrays["entries"], json.loads(str(arrays["problems"])))
    # Scanning the shard gives the index again.
    except (OSError, KeyError, ValueError) as error:
        _logger.debug("%s is not used: %s", stored, error)
    try:
        found = scan_shard(path)
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"{path} is not a whole tar file: {error}",
            "compare its size and checksum with those of its origin, and copy it again",
        ) from error
    try:
        with open_atomic(stored) as file:
            np.savez(file, stamp=stamp, entries=found.entries, problems=json.dumps(found.problems))
    except (OSError, DsrError) as error:
        _logger.warning("%s cannot be written, so every start scans %s: %s", stored, path, error)
    return found


def scan_shard(path: Path) -> ShardIndex:
    """Scans the members of a tar file; samples are sorted by name.

    Of two captions of one sample, that in JSON counts, unless it alone cannot be used.
    """
    captions: dict[str, dict[str, tuple[int, int]]] = {}
    images: dict[str, tuple[int, int]] = {}
    problems: dict[str, str] = {}
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            name, extension = os.path.splitext(member.name)
            if not member.isfile() or is_hidden(os.path.basename(member.name)):
                continue
            if extension in (".json", ".txt"):
                found = captions.setdefault(name, {})
                if problem := _problem_of(archive, member, extension):
                    problems[name] = f"{member.name} {problem}"
                else:
                    found[extension] = (member.offset_data, member.size)
            elif extension.lower() in EXTENSIONS:
                images[name] = (member.offset_data, member.size)
        _check_end(path, archive.offset)
    entries = []
    for name in sorted(images):
        if found := captions.get(name, {}):
            problems.pop(name, None)
            kind = ".json" if ".json" in found else ".txt"
            entries.append((*found[kind], kind == ".json", *images[name]))
        elif name not in captions:
            problems[name] = f"{name} has an image, but no caption"
    for name in captions:
        if name not in images:
            problems[name] = f"{name} has a caption, but no image"
    return ShardIndex(np.array(entries, np.int64).reshape(-1, len(FIELDS)), [*problems.values()])


def _check_end(path: Path, offset: int) -> None:
    """Checks that a tar file's last header is its end, since tarfile stops at a damaged one, too.

    Raises:
      tarfile.ReadError: If it is not.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f"the header at byte {offset} is damaged")


def _problem_of(archive: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> str:
    """Returns what is wrong with a caption; "" if nothing is."""
    file = archive.extractfile(member)
    content = file.read() if file else b""
    try:
        if extension == ".json":
            parse_record(content)
        else:
            parse_caption(content.decode())
    except PromptError as error:
        return error.problem
    except UnicodeDecodeError:
        return "is no UTF-8 text"
    return ""
