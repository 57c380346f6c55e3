"""Sets of images to be scored: `.npz` files, folders of image files, data sources.

Each gives its images in one order, in batches, and of every batch the rows that are wanted.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dsr_jax.core.errors import DataError, EvaluationError
from dsr_jax.core.images import EXTENSIONS, decode, find_image_files, read_file, to_array
from dsr_jax.evaluation.samples import SampleFile, open_samples

_THREADS = 8
_LOSSY = {".jpg", ".jpeg", ".webp"}


class ImageSet(Protocol):
    """Images in a fixed order.

    Attributes:
      shape: [N, H, W, C].
      labels: Class of every image [N], int32, or None.
    """

    @property
    def shape(self) -> tuple[int, int, int, int]: ...

    @property
    def labels(self) -> np.ndarray | None: ...

    def batches(
        self, size: int, start: int = 0, rows: np.ndarray | None = None
    ) -> Iterator[np.ndarray]:
        """Yields uint8 [<= size, H, W, C] or the wanted rows of it; see `SampleFile.batches`."""
        ...

    def describe(self) -> dict[str, Any]:
        """Returns the source of the images with their digest, as JSON values."""
        ...


def open_images(path: str | os.PathLike[str]) -> "SampleFile | ImageFiles":
    """Opens an `.npz` or a folder of image files.

    Raises:
      EvaluationError: Naming what is wrong with it.
    """
    return ImageFiles(Path(path)) if Path(path).is_dir() else open_samples(path)


class _ByIndex:
    """Base of image sets that are read image by image, by several threads.

    Attributes:
      shape: [N, H, W, C].
    """

    shape: tuple[int, int, int, int]

    def _read(self, index: int) -> np.ndarray:
        raise NotImplementedError

    def batches(
        self, size: int, start: int = 0, rows: np.ndarray | None = None
    ) -> Iterator[np.ndarray]:
        """Yields uint8 [<= size, H, W, C] in order; only the wanted rows are read."""
        wanted = np.arange(size) if rows is None else rows
        with ThreadPoolExecutor(_THREADS) as pool:
            for first in range(start, self.shape[0], size):
                numbers = first + wanted[wanted < self.shape[0] - first]
                yield self._stack(list(pool.map(self._read, numbers.tolist())))

    def take(self, rows: Iterable[int]) -> np.ndarray:
        """Reads images by number, uint8 [n, H, W, C]."""
        with ThreadPoolExecutor(_THREADS) as pool:
            return self._stack(list(pool.map(self._read, rows)))

    def _stack(self, images: list[np.ndarray]) -> np.ndarray:
        return np.stack(images) if images else np.zeros((0, *self.shape[1:]), np.uint8)


class ImageFiles(_ByIndex):
    """The image files of a folder or of its subfolders, by path, in RGB.

    `core.images` says which files are images and how they are decoded.

    Args:
      folder: Holds the files, or subfolders of them, such as one for each class.

    Raises:
      EvaluationError: If there are none, if there are images both beside and in subfolders, or if
        the first cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._names = _image_names(folder)
        self.labels: np.ndarray | None = None
        self._size: tuple[int, ...] = ()
        self._size = self._read(0).shape
        height, width, channels = self._size
        self.shape = (len(self._names), height, width, channels)

    def _read(self, index: int) -> np.ndarray:
        path = self.path / self._names[index]
        try:
            pixels = to_array(decode(read_file(path), str(path)))
        except DataError as error:
            raise EvaluationError(error.problem, "make or copy it again") from error
        if self._size and pixels.shape != self._size:
            raise EvaluationError(
                f"image {path} has {pixels.shape[:2]} pixels, the first of the folder "
                f"{self._size[:2]}",
                "score images of one size; mixed sizes are mostly a sign of mixed runs",
            )
        return pixels

    def digest(self) -> str:
        """Returns the SHA-256 of all names and contents, in order."""
        total = hashlib.sha256()
        for name in self._names:
            content = read_file(self.path / name)
            total.update(os.fsencode(name) + hashlib.sha256(content).digest())
        return "sha256:" + total.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Returns name, digest, and whether some files are lossy."""
        lossy = sorted({Path(name).suffix.lower() for name in self._names} & _LOSSY)
        return {
            "file": self.path.name,
            "digest": self.digest(),
            "record": None,
            "shape": list(self.shape),
            **({"lossy": lossy} if lossy else {}),
        }


def _image_names(folder: Path) -> list[str]:
    """Lists the image files below a folder, relative to it.

    Raises:
      EvaluationError: If there are none, or some both beside and in subfolders.
    """
    names = find_image_files(folder)
    if not names:
        raise EvaluationError(
            f"{folder} holds no image files",
            f"name an .npz, or a folder of {', '.join(EXTENSIONS)}",
        )
    beside = [name for name in names if os.sep not in name]
    if beside and len(beside) < len(names):
        raise EvaluationError(
            f"{folder} holds {len(beside)} images ({beside[0]}, ...) beside subfolders with "
            f"{len(names) - len(beside)}, and only one of the two can be scored",
            "move the others elsewhere",
        )
    return names


class Indexed(Protocol):
    """Interface of `data.sources.Source`."""

    name: str
    image_shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class SourceImages(_ByIndex):
    """The images of a data source, each once.

    Args:
      source: Gives {"image": uint8 [H, W, C], ...} by index.
      count: Number of images to take, at even intervals; 0 for all.

    Raises:
      EvaluationError: If there are not as many.
    """

    def __init__(self, source: Indexed, count: int = 0) -> None:
        total = len(source)
        if count > total:
            raise EvaluationError(
                f"{count} images are asked for, {source.name} holds {total}", "ask for fewer"
            )
        self._source = source
        self._indices = np.arange(count or total) * total // (count or total)
        self.labels: np.ndarray | None = None
        self.shape = (len(self._indices), *source.image_shape)

    def _read(self, index: int) -> np.ndarray:
        return self._source[int(self._indices[index])]["image"]

    def describe(self) -> dict[str, Any]:
        """Returns the source's name and the number of images taken; sources have no digest."""
        return {
            "source": self._source.name,
            "images": len(self._indices),
            "of": len(self._source),
            "shape": list(self.shape),
        }
