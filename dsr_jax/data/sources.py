"""Random-access sources of labelled images, made by name."""

from __future__ import annotations

import logging

import numpy as np

from dsr_jax.core.errors import DataError, UnreadableRecord
from dsr_jax.data import bundled, folder, records
from dsr_jax.data.base import Record, Source
from dsr_jax.data.classes import describe
from dsr_jax.data.images import fit_name

MAX_SUBSTITUTIONS = 100

_logger = logging.getLogger(__name__)


def make_source(
    name: str,
    *,
    image_size: int,
    channels: int,
    root: str | None = None,
    split: str = "train",
    num_classes: int | None = None,
    on_corrupt: str = "error",
    fit: str = "center_crop",
) -> Source:
    """Makes the source called `name`.

    Args:
      name: "digits" (scikit-learn's handwritten digits), "synthetic" (coloured shapes), "folder"
        (class folders of image files), "arrayrecord" (packed image files) or "tfds:NAME".
      image_size: Side of the square images.
      channels: 1 or 3; "synthetic" takes any number.
      root: Folder of "folder" and "arrayrecord"; data_dir of "tfds:NAME".
      split: "train", "heldout" or "all" for digits and synthetic (every fifth record, index % 5 ==
        0, is held out); a folder, a file prefix or a TFDS split for the others.
      num_classes: Size of the model's label table. "synthetic" makes that many classes, and
        "arrayrecord" requires it.
      on_corrupt: "error" raises on an unreadable image file; "skip" takes the next readable record
        in its place, so that the stream remains a function of (seed, step).
      fit: How image files are brought to that size, see `images.FITS`; "resize_shorter_side"
        gives images of different shapes, to be cropped by `make_batches`.

    Raises:
      DataError: If there is no such source, the files are not there, or there are more classes than
        `num_classes`.
    """
    if on_corrupt not in ("error", "skip"):
        raise DataError(f"on_corrupt={on_corrupt!r}", "choose from error, skip")
    source = _make(name, image_size, channels, root, split, num_classes, fit_name(fit))
    if num_classes is not None and source.num_classes > num_classes:
        raise DataError(
            f"{source.name} has {source.num_classes} classes, the label table {num_classes}",
            f"set config.data.num_classes={source.num_classes}",
        )
    return SkipUnreadable(source) if on_corrupt == "skip" else source


def _make(
    name: str,
    image_size: int,
    channels: int,
    root: str | None,
    split: str,
    num_classes: int | None,
    fit: str,
) -> Source:
    kind, _, dataset = name.partition(":")
    if kind in ("folder", "arrayrecord") and not root:
        raise DataError(f"data source {name!r} needs a folder", "set config.data.root")
    if kind != "synthetic" and channels not in (1, 3):
        raise DataError(f"{channels} channels of {name!r}", "set config.data.channels to 1 or 3")
    if kind == "digits":
        return bundled.Digits(split, image_size, channels)
    if kind == "synthetic":
        return bundled.Shapes(split, image_size, channels, num_classes or 10)
    if kind == "folder":
        return folder.ImageFolder(str(root), split, image_size, channels, fit)
    if kind == "arrayrecord":
        return records.ArrayRecords(str(root), split, image_size, channels, num_classes, fit)
    if kind == "tfds" and dataset:
        return records.Tfds(dataset, root or None, split, image_size, channels, fit)
    raise DataError(
        f"no data source is called {name!r}",
        "choose from digits, synthetic, folder, arrayrecord, tfds:NAME",
    )


def read_all(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Reads a small source into memory: images [N, H, W, C], uint8, and labels [N], int32."""
    records = [source[index] for index in range(len(source))]
    labels = np.array([record["label"] for record in records], np.int32)
    return np.stack([record["image"] for record in records]), labels


class SkipUnreadable:
    """Puts the next readable record, in index order, in the place of an unreadable one.

    Which record is taken depends on the files alone, not on the order of reading. Only damaged
    content is skipped: an I/O error may pass, and skipping it would change the stream from one
    reading to the next, so it is raised.

    Args:
      source: Raises `UnreadableRecord` where it must.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._reported: set[int] = set()
        self.name = source.name
        self.num_classes = source.num_classes
        self.image_shape = source.image_shape
        description = describe(source)
        self.class_names, self.class_counts = description["names"], description["counts"]
        self.fingerprint = description["fingerprint"]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        """Returns the first readable record at or after `index`, wrapping around.

        Raises:
          DataError: If a hundred records in a row are unreadable.
        """
        attempts = min(MAX_SUBSTITUTIONS, len(self))
        for candidate in range(index, index + attempts):
            try:
                return self._source[candidate % len(self)]
            except UnreadableRecord as error:
                self._report(candidate % len(self), error)
        raise DataError(
            f"{attempts} records of {self.name} in a row are unreadable, from number {index}",
            "check the data set; one damaged file is skipped, not a damaged disk",
        )

    def _report(self, index: int, error: UnreadableRecord) -> None:
        if index not in self._reported:
            self._reported.add(index)
            _logger.warning("skipped: %s", error.problem)
