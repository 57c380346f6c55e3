"""Classes of samples, as a function of their global indices.

The label of sample i depends on the seed and on i, never on batch size, hosts or the number of
samples, so the kept set is always exactly balanced (spec evaluation 2; the official script can
leave 48 to 52 images per class, spec denoiser 7). Its own tables can be followed as a label file.
"""

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsr_jax.core.arrays import read_array, read_arrays
from dsr_jax.core.errors import DataError

MAX_TEXT_BYTES = 64 * 2**20


def balanced_labels(num_samples: int, classes: Sequence[int], seed: int) -> np.ndarray:
    """Returns labels [N], int32, as many of each of `classes` as possible.

    Samples are cut into blocks of `len(classes)` indices, and each block holds every class once, in
    a random order of its own. So every prefix is balanced to within one, more samples extend the
    same table, and the order is shuffled as the Inception Score's chunks need it.
    """
    blocks = -(-num_samples // len(classes))
    # RandomState, not Generator: NumPy promises the stream of the former for ever (NEP 19).
    numbers = np.random.RandomState(seed).random_sample((blocks, len(classes)))
    order = np.argsort(numbers, axis=1, kind="stable")
    return np.asarray(classes, np.int32)[order.reshape(-1)[:num_samples]]


def random_labels(num_samples: int, classes: Sequence[int], seed: int) -> np.ndarray:
    """Returns independent uniform labels [N], int32, of `classes`, as ADM, SiT and REPA do."""
    numbers = np.random.RandomState(seed).random_sample(num_samples)
    return np.asarray(classes, np.int32)[(numbers * len(classes)).astype(np.int32)]


def cycled_labels(classes: Sequence[int], num_samples: int) -> np.ndarray:
    """Returns `classes` repeated in order up to `num_samples` labels [N], int32.

    Raises:
      DataError: If `classes` is empty, or has numbers beyond 32 bits.
    """
    if not classes:
        raise DataError("the list of classes is empty", "name at least one class")
    if not _fits(min(classes), max(classes)):
        raise DataError(
            f"{max(classes, key=abs)} in the list of classes is beyond 32 bits", "correct --classes"
        )
    return np.resize(np.asarray(classes, np.int32), num_samples)


def load_labels(path: str | os.PathLike[str], num_samples: int) -> np.ndarray:
    """Reads the labels [N], int32, of samples 0..N-1 from a file.

    Args:
      path: `.npy` (one array), `.npz` (key `labels`, or the only one-dimensional array; a file of
        samples serves as well) or `.txt` (whitespace-separated numbers).
      num_samples: Number of samples to take from the beginning.

    Raises:
      DataError: If the file is missing, unreadable, not integer or too short.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise DataError(f"label file {str(path)!r} has an unknown ending", "use .npy, .npz or .txt")
    if not path.is_file():
        raise DataError(f"label file {str(path)!r} not found", "check the path")
    try:
        values = _READERS[path.suffix](path)
    except (*(ValueError, OSError, OverflowError),) as error:
        raise DataError(
            f"label file {str(path)!r} cannot be read: {error}",
            "write whole numbers with numpy.save, numpy.savez, or as text separated by spaces",
        ) from error
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise DataError(
            f"label file {str(path)!r} holds {values.dtype} of shape {values.shape}",
            "it must hold a one-dimensional array of whole numbers, one per sample",
        )
    if len(values) < num_samples:
        raise DataError(
            f"label file {str(path)!r} holds {len(values)} labels, {num_samples} are needed",
            "ask for fewer samples or give a longer table",
        )
    values = values[:num_samples]
    if len(values) and not _fits(int(values.min()), int(values.max())):
        raise DataError(
            f"label file {str(path)!r} holds numbers beyond 32 bits", "write the labels again"
        )
    return values.astype(np.int32)


def _fits(lowest: int, highest: int) -> bool:
    limits = np.iinfo(np.int32)
    return limits.min <= lowest and highest <= limits.max


def _read_npy(path: Path) -> np.ndarray:
    if zipfile.is_zipfile(path):
        raise ValueError("it is an archive of arrays; its name should end in .npz")
    return read_array(path)


def _read_npz(path: Path) -> np.ndarray:
    if not zipfile.is_zipfile(path) and path.read_bytes()[:6] == np.lib.format.MAGIC_PREFIX:
        raise ValueError("it is a single array; its name should end in .npy")
    arrays = read_arrays(path)
    if "labels" in arrays:
        return arrays["labels"]
    flat = {name: array for name, array in arrays.items() if array.ndim == 1}
    if len(flat) != 1:
        raise ValueError(f"no key 'labels', and one-dimensional arrays are {sorted(flat)}")
    return next(iter(flat.values()))


def _read_txt(path: Path) -> np.ndarray:
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise ValueError(f"it is larger than {MAX_TEXT_BYTES >> 20} MiB; use .npy")
    return np.array([int(word) for word in path.read_text().split()], np.int64)


_READERS = {".npy": _read_npy, ".npz": _read_npz, ".txt": _read_txt}


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Checks that every label names a class; the null label is no class.

    Raises:
      DataError: Naming the first sample whose label does not.
    """
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        first = int(outside[0])
        raise DataError(
            f"sample {first} has label {int(labels[first])}, and {len(outside)} of {len(labels)} "
            f"labels are outside the model's classes 0..{num_classes - 1}",
            "correct --classes or the label file",
        )
