"""Sample files: checked before use, and read in pieces.

The contract is the ADM evaluator's: `arr_0`, uint8 [N, H, W, C]; ours adds `labels` and a `.json`
with the recipe beside the file (spec evaluation 2).
"""

import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from dsr_jax.core.arrays import READ_ERRORS
from dsr_jax.core.errors import EvaluationError
from dsr_jax.core.files import file_digest, read_json

_REWRITE = "make it again, or copy it again"
_NO_RECORD = "copy it again, or move it elsewhere: scores quote the record beside the samples"


@dataclass(frozen=True)
class SampleFile:
    """A checked `.npz` of samples; the images stay on disk until asked for.

    Attributes:
      path: Path of the file.
      shape: [N, H, W, C] of the images.
      labels: Class of every image [N], int32, or None where the file has none.
    """

    path: Path
    shape: tuple[int, int, int, int]
    labels: np.ndarray | None

    def batches(
        self, size: int, start: int = 0, rows: np.ndarray | None = None
    ) -> Iterator[np.ndarray]:
        """Yields the images in order, uint8 [<= size, H, W, C], one batch in memory at a time.

        Args:
          size: Images per batch.
          start: Image to begin with.
          rows: Ascending rows [n] of each batch that are wanted, as a process of several holds them
            (`parallel.shardings.process_rows`); of the last batch, those that it has. None for all.

        Raises:
          EvaluationError: If the stored bytes are damaged.
        """
        with _opened(self.path) as archive, archive.open("arr_0.npy") as member:
            _read_header(member)
            row = int(np.prod(self.shape[1:]))
            try:
                # From the archive's own reader, which compares checksums, unlike a memory map.
                member.seek(start * row, os.SEEK_CUR)
                for first in range(start, self.shape[0], size):
                    count = min(size, self.shape[0] - first)
                    raw = member.read(count * row)
                    images = np.frombuffer(raw, np.uint8).reshape(count, *self.shape[1:])
                    yield images if rows is None else images[rows[rows < count]]
            except READ_ERRORS as error:
                raise _damaged(self.path, str(error)) from error

    def images(self) -> np.ndarray:
        """Reads all images [N, H, W, C]; errors as in `batches`."""
        return np.concatenate(list(self.batches(1024)))

    def recipe(self) -> dict[str, Any] | None:
        """Returns the record that the sampling job wrote next to the file.

        None if there is none, or a file of another form, as other programs may write.

        Raises:
          DamagedFileError: If it is not JSON.
        """
        path = self.path.with_suffix(".json")
        record = read_json(path, _NO_RECORD) if path.is_file() else None
        is_record = isinstance(record, dict) and isinstance(record.get("recipe", {}), dict)
        return record if is_record else None

    def digest(self) -> str:
        """Returns the SHA-256 of the file."""
        return file_digest(self.path)

    def describe(self) -> dict[str, Any]:
        """Returns name, digest, shape, and the record of the job that made the images."""
        return {
            "file": self.path.name,
            "digest": self.digest(),
            "record": self.recipe(),
            "shape": list(self.shape),
        }

    def require_labels(self, purpose: str) -> np.ndarray:
        """Returns the labels.

        Raises:
          EvaluationError: If the file has none, saying what needs them.
        """
        if self.labels is None:
            raise EvaluationError(
                f"{self.path} holds no labels, and {purpose} needs the class of every sample",
                "add an integer array 'labels' [N] to the file, as python -m dsr_jax.sample does",
            )
        return self.labels


def open_samples(path: str | os.PathLike[str]) -> SampleFile:
    """Opens an `.npz` of samples and checks keys, types, shapes and sizes.

    Python objects in the file are refused and never unpickled.

    Raises:
      EvaluationError: Naming the file, the key and what is wrong with it.
    """
    path = Path(path)
    keys = read_names(path, "sample")
    if "arr_0" not in keys:
        raise EvaluationError(
            f"{path} has no key 'arr_0', its keys are {keys}",
            "save the images as arr_0: numpy.savez(path, images, labels=labels)",
        )
    with _opened(path) as archive:
        shape = _check_images(path, archive)
        labels = _read_labels(path, archive, shape[0], keys)
    return SampleFile(path, shape, labels)


def read_names(path: Path, kind: str) -> list[str]:
    """Returns the keys of an `.npz`.

    Args:
      path: Path of the file.
      kind: Name of the kind of file, for error messages.

    Raises:
      EvaluationError: If there is no such file, or it is damaged.
    """
    if not path.is_file():
        raise EvaluationError(f"{kind} file {str(path)!r} not found", "check the path")
    if path.suffix == ".npy":
        raise EvaluationError(
            f"{kind} file {path} is a single array (.npy), expected an .npz",
            f"save it as arr_0: numpy.savez({str(path.with_suffix('.npz'))!r}, "
            f"numpy.load({str(path)!r}))",
        )
    with _opened(path) as archive:
        names = [info.filename for info in archive.infolist()]
        return [name.removesuffix(".npy") for name in names if name.endswith(".npy")]


def read_member(path: Path, key: str) -> np.ndarray:
    """Reads one array of an `.npz` whole; Python objects are refused and never unpickled.

    Raises:
      EvaluationError: Naming the key and what is wrong with it.
    """
    with _opened(path) as archive:
        _check_header(path, archive, key)
        with archive.open(f"{key}.npy") as member:
            try:
                return np.lib.format.read_array(member, allow_pickle=False)
            except READ_ERRORS as error:
                raise _damaged(path, f"{key}: {error}") from error


def check_levels(images: np.ndarray, path: Path) -> None:
    """Checks that images use gray levels beyond 0 and 1.

    Raises:
      EvaluationError: If they look like floats in [0, 1] that were cast without scaling.
    """
    if images.max() <= 1:
        raise EvaluationError(
            f"arr_0 of {path} has no value above {int(images.max())}, although uint8 images go "
            "from 0 to 255",
            "multiply images in [0, 1] by 255 before the cast to uint8",
        )


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except READ_ERRORS as error:
        raise _damaged(path, f"{error}; it may be cut short") from error


def _damaged(path: Path, problem: str) -> EvaluationError:
    return EvaluationError(f"{path} is damaged: {problem}", _REWRITE)


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads (shape, fortran order, dtype) and leaves `member` at the first value."""
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(member)
    raise ValueError(f"npy version {version} is not 1.0 or 2.0")


def _check_header(
    path: Path, archive: zipfile.ZipFile, key: str
) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads one member's header and checks that its size agrees with it."""
    info = archive.getinfo(f"{key}.npy")
    try:
        with archive.open(info) as member:
            shape, fortran, dtype = _read_header(member)
            header_bytes = member.tell()
    except READ_ERRORS as error:
        raise _damaged(path, f"{key}: {error}") from error
    if dtype.hasobject:
        raise EvaluationError(
            f"{key} of {path} holds Python objects, which could run code when read; refused",
            f"save {key} as a plain number array",
        )
    want = header_bytes + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if info.file_size != want:
        raise _damaged(
            path, f"{key} has {info.file_size} bytes, {want} are needed for {dtype}{shape}"
        )
    return shape, fortran, dtype


def _check_images(path: Path, archive: zipfile.ZipFile) -> tuple[int, int, int, int]:
    shape, fortran, dtype = _check_header(path, archive, "arr_0")
    if dtype != np.uint8:
        raise EvaluationError(
            f"arr_0 of {path} is {dtype}, expected uint8 from 0 to 255{_levels(archive, dtype)}",
            "convert the images: clip to [0, 1], multiply by 255, cast to uint8",
        )
    if len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
        raise EvaluationError(
            f"arr_0 of {path} has shape {shape}, expected [N, H, W, 1 or 3] with N > 0",
            "save images channels last, gray or RGB",
        )
    if fortran:
        raise EvaluationError(
            f"arr_0 of {path} is in Fortran order",
            "save numpy.ascontiguousarray(images), so that images can be read one by one",
        )
    return (shape[0], shape[1], shape[2], shape[3])


def _levels(archive: zipfile.ZipFile, dtype: np.dtype) -> str:
    """Describes the first values of a float array, for an error."""
    if dtype.kind != "f" or dtype.itemsize > 8:
        return ""
    with archive.open("arr_0.npy") as member:
        _read_header(member)
        raw = member.read(2**20)
    values = np.frombuffer(raw[: len(raw) // dtype.itemsize * dtype.itemsize], dtype)
    if not len(values):
        return ""
    if not np.isfinite(values).all():
        return "; it holds values that are not finite"
    return f"; its values begin at {values.min():.3g} and end at {values.max():.3g}"


def _read_labels(
    path: Path, archive: zipfile.ZipFile, count: int, keys: list[str]
) -> np.ndarray | None:
    """Reads the classes from `labels`, or from `arr_1`, where the ADM sampler writes them."""
    if "labels" in keys:
        key = "labels"
    elif "arr_1" in keys:
        key = "arr_1"
    else:
        return None
    shape, _, dtype = _check_header(path, archive, key)
    if shape != (count,) or not np.issubdtype(dtype, np.integer):
        raise EvaluationError(
            f"{key} of {path} is {dtype}{shape}, expected integer labels [{count}]",
            "save one class number per image as 'labels', or leave the array out",
        )
    labels = read_member(path, key)
    if (bad := np.flatnonzero(labels < 0)).size:
        raise EvaluationError(
            f"{key} of {path} holds the label {labels[bad[0]]} (image {bad[0]}); classes are 0 and "
            "above",
            "save the class of every image, or no labels at all",
        )
    if labels.max(initial=0) > np.iinfo(np.int32).max:
        raise EvaluationError(
            f"{key} of {path} holds the label {labels.max()}, which is beyond 32 bits",
            "save the class of every image, or no labels at all",
        )
    return labels.astype(np.int32)
