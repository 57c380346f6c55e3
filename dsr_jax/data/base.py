"""The data source protocol: what every source provides and receives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NotRequired, Protocol, TypedDict

import numpy as np

from dsr_jax.core.errors import DataError

HELDOUT_EVERY = 5


class Record(TypedDict):
    """One image, uint8 [H, W, C] (of `CachedLatents` floats), with its label or caption.

    A caption is int32 `tokens` and `targets` [T], see `core.prompts`.
    """

    image: np.ndarray
    label: NotRequired[np.int32]
    tokens: NotRequired[np.ndarray]
    targets: NotRequired[np.ndarray]


@dataclass(frozen=True)
class SourceOptions:
    """Options of a data source from the config; a source ignores those that do not concern it.

    Attributes:
      image_size: Side of the square images.
      channels: 1 for gray, 3 for RGB; toy data sets take any number.
      root: Folder of the files, if any.
      split: Part of the data set, for example "train".
      num_classes: Rows of the model's label table; None where labels are of no use.
      fit: Method of resizing image files, a name in `images.FITS`.
      class_map: File that gives class names their labels, see `class_map.read_class_map`.
      dataset: Part of the source's name after the colon, as in "tfds:cifar10".
      on_corrupt: "error" or "skip", for sources that check their records when they are opened.
    """

    image_size: int
    channels: int = 3
    root: str | None = None
    split: str = "train"
    num_classes: int | None = None
    fit: str = "center_crop"
    class_map: str = ""
    dataset: str = ""
    on_corrupt: str = "error"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images."""
        return self.image_size, self.image_size, self.channels

    def require_root(self, source: str) -> str:
        """Returns the folder.

        Raises:
          DataError: If there is none.
        """
        if not self.root:
            raise DataError(f"data source {source!r} needs a folder", "set config.data.root")
        return self.root

    def require_gray_or_rgb(self, source: str) -> None:
        """Checks the number of channels.

        Raises:
          DataError: If it is neither 1 nor 3.
        """
        if self.channels not in (1, 3):
            raise DataError(
                f"data source {source!r} has no images of {self.channels} channels",
                "set config.data.channels to 1 or 3",
            )


class Source(Protocol):
    """Labeled or captioned images by index; the same index gives the same record in every process.

    A source of captions has `caption_length`, the length of its token sequences, and 0 classes.
    A source may also have `class_names` (names by label), `class_counts` (records by label) and
    `fingerprint` (a digest of its listing), see `classes.describe`.

    Attributes:
      name: Name in logs and provenance.
      num_classes: Labels are in [0, num_classes).
      image_shape: Height, width and channels of every image.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def caption_length(source: Source) -> int:
    """Returns the length of the token sequences of a source of captions, 0 for labels."""
    length: int = getattr(source, "caption_length", 0)
    return length


def split_indices(num_records: int, split: str, name: str) -> np.ndarray:
    """Returns the indices of a split of a data set without splits: every fifth record is held out.

    Raises:
      DataError: If there is no such split.
    """
    indices = np.arange(num_records)
    heldout = indices % HELDOUT_EVERY == 0
    splits = {"train": indices[~heldout], "heldout": indices[heldout], "all": indices}
    if split not in splits:
        raise DataError(f"{name} has no split {split!r}", f"choose from {', '.join(splits)}")
    return splits[split]


def check_label(label: int, num_classes: int, index: int, name: str) -> None:
    """Checks the label of a record.

    Raises:
      DataError: If it is not one of the classes; -1 is what unlabeled splits have.
    """
    if not 0 <= label < num_classes:
        remedy = f"set config.data.num_classes to at least {label + 1}, if the label is right"
        raise DataError(
            f"record {index} of {name} has label {label}, which is not in 0 to {num_classes - 1}",
            remedy if label >= 0 else "choose a labeled split",
        )
