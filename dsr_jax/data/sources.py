"""Data sources by name: a source is one class, registered in SOURCES or named by its module."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from dsr_jax.core.errors import DataError, UnreadableRecord
from dsr_jax.core.plugins import is_reference, load_object
from dsr_jax.core.prompts import REQUEST, PromptTokenizer
from dsr_jax.data.base import Record, Source, SourceOptions, caption_length, check_label
from dsr_jax.data.caption_files import CaptionFolder, JsonlCaptions
from dsr_jax.data.captions import CaptionSource, TokenizedCaptions
from dsr_jax.data.classes import describe
from dsr_jax.data.folder import ImageFolder
from dsr_jax.data.records import ArrayRecords, Tfds
from dsr_jax.data.shapes import CaptionedShapes
from dsr_jax.data.tar_captions import TarCaptions
from dsr_jax.data.toy import Digits, Shapes

MAX_SUBSTITUTIONS = 100

_logger = logging.getLogger(__name__)


SOURCES: Mapping[str, Callable[[SourceOptions], Source]] = MappingProxyType(
    {
        "digits": Digits,
        "synthetic": Shapes,
        "folder": ImageFolder,
        "arrayrecord": ArrayRecords,
        "tfds": Tfds,
    }
)
"""The data sources of this package, by the name in configs; "tfds" stands before ":NAME"."""


def make_source(name: str, *, on_corrupt: str = "error", **options: Any) -> Source:
    """Makes the source called `name`.

    Args:
      name: A name in SOURCES: "digits" (scikit-learn's handwritten digits), "synthetic" (colored
        shapes), "folder" (class folders of image files), "arrayrecord" (packed image files),
        "tfds:NAME" (TensorFlow Datasets); or "package.module:Class", a class of that module which
        takes a `SourceOptions`.
      on_corrupt: "error" raises on an unreadable image file; "skip" takes the next readable record
        in its place, so that the stream remains a function of (seed, step).
      **options: Fields of `SourceOptions`. "resize_shorter_side" as `fit` gives images of different
        shapes, to be cropped by `make_batches`.

    Raises:
      DataError: If there is no such source, the files are not there, or there are more classes than
        `num_classes`.
      ConfigError: If "package.module:Class" cannot be imported.
    """
    if on_corrupt not in ("error", "skip"):
        raise DataError(f"on_corrupt={on_corrupt!r} is unknown", "choose from error, skip")
    kind, _, dataset = name.partition(":")
    values = SourceOptions(**options)
    if kind in SOURCES and (kind == "tfds") == bool(dataset):
        if values.class_map and kind != "folder":
            raise DataError(
                f"data source {name!r} has its own labels, not those of class_map="
                f"{values.class_map!r}",
                "leave config.data.class_map empty; it is for source=folder",
            )
        source = SOURCES[kind](dataclasses.replace(values, dataset=dataset))
    elif kind not in SOURCES and is_reference(name):
        source = load_object("config.data.source", name)(values)
    else:
        raise DataError(
            f"no data source is called {name!r}",
            "choose from digits, synthetic, folder, arrayrecord, tfds:NAME, package.module:Class",
        )
    check_label_table(source, values.num_classes)
    return SkipUnreadable(source) if on_corrupt == "skip" else source


CAPTION_SOURCES: Mapping[str, Callable[[SourceOptions], CaptionSource]] = MappingProxyType(
    {
        "shapes": CaptionedShapes,
        "webdataset": TarCaptions,
        "jsonl": JsonlCaptions,
        "captions": CaptionFolder,
    }
)
"""The sources of captioned images of this package, by the name in configs."""


def make_caption_source(
    name: str,
    tokenizer: PromptTokenizer,
    n_queries: int,
    length: int,
    *,
    requests: Sequence[str] = (REQUEST,),
    on_corrupt: str = "error",
    **options: Any,
) -> Source:
    """Makes the source of captioned images called `name`, whose records hold tokens and targets.

    Args:
      name: A name in CAPTION_SOURCES: "shapes" (rendered scenes), "webdataset" (tar shards),
        "jsonl" (a file with paths of images), "captions" (a folder of image and text pairs); or
        "package.module:Class", a class of that module which takes a `SourceOptions` and is a
        `CaptionSource`.
      tokenizer: Makes the token sequences.
      n_queries: Slots of an answer image.
      length: Length of the sequences.
      requests: Phrases around captions that are no conversations, with {} in the caption's place;
        record i takes the i-th, in turn.
      on_corrupt: "error" raises on a record that cannot be used; "skip" leaves it out, and takes
        the next one where that shows only when the record is read.
      **options: Fields of `SourceOptions`.

    Raises:
      DataError: If there is no such source, or its files are not there.
      ConfigError: If "package.module:Class" cannot be imported.
    """
    values = SourceOptions(**options, on_corrupt=on_corrupt)
    if name in CAPTION_SOURCES:
        source = CAPTION_SOURCES[name](values)
    elif is_reference(name):
        source = load_object("config.data.source", name)(values)
    else:
        raise DataError(
            f"no source of captions is called {name!r}",
            f"choose from {', '.join(CAPTION_SOURCES)}, package.module:Class",
        )
    records = TokenizedCaptions(source, tokenizer, n_queries, length, requests)
    return SkipUnreadable(records) if on_corrupt == "skip" else records


def check_label_table(source: Source, num_classes: int | None) -> None:
    """Checks that the model's label table has a row for each class.

    Raises:
      DataError: If it has not.
    """
    if num_classes is not None and source.num_classes > num_classes:
        raise DataError(
            f"{source.name} has {source.num_classes} classes, the label table {num_classes}",
            f"set config.data.num_classes={source.num_classes}",
        )


def read_all(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Reads a small source into memory: images [N, H, W, C], uint8, and labels [N], int32."""
    records = [source[index] for index in range(len(source))]
    for index, record in enumerate(records):
        check_label(int(record["label"]), source.num_classes, index, source.name)
    labels = np.array([record["label"] for record in records], np.int32)
    return np.stack([record["image"] for record in records]), labels


class SkipUnreadable:
    """Data source that replaces an unreadable record by the next readable one.

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
        self.caption_length = caption_length(source)
        self.skipped = description.get("skipped", 0)

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
