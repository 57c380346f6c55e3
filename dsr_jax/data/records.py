"""Packed data sets: ArrayRecord files and TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import grain
import numpy as np

from dsr_jax.core.errors import DataError
from dsr_jax.core.images import to_array, to_mode
from dsr_jax.data.base import Record
from dsr_jax.data.images import FITS, decode_image


class ArrayRecords:
    """ArrayRecord files of msgpack maps {"image": bytes of an image file, "label": int}.

    Few large files suit network disks and buckets better than a million small ones.

    Args:
      root: Folder of the files.
      split: Files named `SPLIT-*.array_record` are read, in sorted order.
      image_size: Side of the square images (`images.center_crop`).
      channels: 3, or 1 for grey.
      num_classes: The files do not tell.
      fit: How images are brought to that size, see `images.FITS`.

    Raises:
      DataError: If there are no such files, some are missing, or num_classes is.
    """

    def __init__(
        self,
        root: str,
        split: str,
        image_size: int,
        channels: int,
        num_classes: int | None,
        fit: str = "center_crop",
    ) -> None:
        if num_classes is None:
            raise DataError("arrayrecord files do not tell their classes", "give num_classes")
        pattern = f"{split}-*.array_record"
        files = sorted(str(path) for path in Path(root).glob(pattern))
        if not files:
            raise DataError(
                f"no {pattern} in {root!r}", "set config.data.root and config.data.split"
            )
        shards = re.search(r"-of-(\d+)\.array_record$", files[0])
        if shards and len(files) != int(shards[1]):
            raise DataError(
                f"{len(files)} files {pattern} in {root!r}, but {files[0]} is one of {shards[1]}",
                "copy or pack them all, into an empty folder",
            )
        self._records = grain.sources.ArrayRecordDataSource(files)
        self._fit = fit
        self.name = f"arrayrecord {Path(root) / pattern}"
        self.num_classes = num_classes
        self.image_shape = (image_size, image_size, channels)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        """Reads one record.

        Raises:
          UnreadableRecord: If the image is damaged.
          DataError: If the label is not one of the classes.
        """
        import msgpack

        record = msgpack.unpackb(self._records[index])
        label = record["label"]
        if not 0 <= label < self.num_classes:
            raise DataError(
                f"record {index} of {self.name} has label {label} of {self.num_classes} classes",
                "set config.data.num_classes",
            )
        size, _, channels = self.image_shape
        origin = f"{index} of {self.name}"
        image = decode_image(record["image"], origin, size, channels, fit=self._fit)
        return {"image": image, "label": np.int32(label)}


def write_array_records(path: Path, images: Iterable[tuple[bytes, int]]) -> None:
    """Packs image files, as they are, into one ArrayRecord file that `ArrayRecords` reads.

    Args:
      path: `FOLDER/SPLIT-00000.array_record` or the like.
      images: Content and label of each file.
    """
    import msgpack

    write_records(
        path,
        (msgpack.packb({"image": content, "label": int(label)}) for content, label in images),
    )


def write_records(path: Path, records: Iterable[bytes]) -> None:
    """Writes one ArrayRecord file, which appears under its name only when it is whole."""
    from array_record.python.array_record_module import ArrayRecordWriter

    part = path.with_name(f"{path.name}.part")
    # One record per compressed group: random access reads nothing that it does not need.
    writer = ArrayRecordWriter(str(part), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    part.rename(path)


def count_records(path: Path) -> int:
    """How many records an ArrayRecord file holds."""
    return len(grain.sources.ArrayRecordDataSource([str(path)]))


class Tfds:
    """A prepared TensorFlow data set with the features "image" and "label".

    Args:
      dataset: Its name, for example "cifar10" or "imagenet2012:5.1.0".
      data_dir: Where it was prepared; None for TFDS's default.
      split: Any TFDS split, for example "train" or "train[:90%]".
      image_size: Side of the square images (`images.center_crop`).
      channels: 3, or 1 for grey.
      fit: How images are brought to that size, see `images.FITS`.

    Raises:
      DataError: If TFDS is missing, or the data set is not prepared there or has other features.
    """

    def __init__(
        self,
        dataset: str,
        data_dir: str | None,
        split: str,
        image_size: int,
        channels: int,
        fit: str = "center_crop",
    ) -> None:
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise DataError(
                f"data source 'tfds:{dataset}' needs tensorflow_datasets",
                "pip install tensorflow-datasets",
            ) from error
        try:
            self._records = tfds.data_source(
                dataset, split=split, data_dir=data_dir, download=False
            )
        except (AssertionError, OSError, ValueError, NotImplementedError) as error:
            raise DataError(
                f"TFDS cannot open {dataset!r}, split {split!r}: {error}",
                "prepare it with --file_format=array_record, and set config.data.root to its "
                "data_dir",
            ) from error
        features = self._records.dataset_info.features
        if not {"image", "label"} <= set(features):
            raise DataError(
                f"TFDS {dataset!r} has the features {', '.join(features)}",
                "choose a data set with image and label",
            )
        self._fit = fit
        self.name = f"tfds {dataset} {split}"
        self.num_classes = features["label"].num_classes
        self.class_names = list(features["label"].names)
        self.image_shape = (image_size, image_size, channels)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        from PIL import Image

        record = self._records[index]
        pixels = record["image"]
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        size, _, channels = self.image_shape
        fitted = FITS[self._fit](to_mode(image, channels), size)
        return {"image": to_array(fitted), "label": np.int32(record["label"])}
