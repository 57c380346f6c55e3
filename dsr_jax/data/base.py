"""What every data source is, and what it raises."""

from __future__ import annotations

from typing import Protocol, TypedDict

import numpy as np

from dsr_jax.core.errors import DataError

HELDOUT_EVERY = 5


class Record(TypedDict):
    """One labelled image: uint8 [H, W, C] (of `CachedLatents` floats) and a scalar."""

    image: np.ndarray
    label: np.int32


class Source(Protocol):
    """Labelled images by index; the same index gives the same record in every process.

    Attributes:
      name: What to call it in logs and provenance.
      num_classes: Labels lie in [0, num_classes).
      image_shape: Height, width and channels of every image.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def split_indices(num_records: int, split: str, name: str) -> np.ndarray:
    """Indices of a split of a data set that has none of its own: every fifth record is held out.

    Raises:
      DataError: If there is no such split.
    """
    indices = np.arange(num_records)
    heldout = indices % HELDOUT_EVERY == 0
    splits = {"train": indices[~heldout], "heldout": indices[heldout], "all": indices}
    if split not in splits:
        raise DataError(f"{name} has no split {split!r}", f"choose from {', '.join(splits)}")
    return splits[split]
