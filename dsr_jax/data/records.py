"""Packed data sets: ArrayRecord files and TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import grain
import numpy as np

from dsr_jax.core.errors import DataError, DsrError, StorageError
from dsr_jax.core.files import name_storage_errors, read_json, temporary_file
from dsr_jax.core.images import to_array, to_mode
from dsr_jax.data.base import Record, SourceOptions
from dsr_jax.data.classes import fingerprint
from dsr_jax.data.images import FITS, decode_image, fit_name

RECORD_ERRORS = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError)
"""What damaged records raise: RuntimeError where ArrayRecord's own checksums fail."""


class ArrayRecords:
    """ArrayRecord files of msgpack maps {"image": bytes of an image file, "label": int}.

    Few large files suit network disks and buckets better than a million small ones. Class names,
    counts and digests are those of `SPLIT.json`, if tools/prepare_imagenet.py wrote one next to
    the files.

    Args:
      options: `root`; `split`, of which files named `SPLIT-*.array_record` are read in sorted
        order; size, channels and `fit` of the images; `num_classes`, without a `SPLIT.json`.

    Raises:
      DataError: If there are no such files, some are missing, or the classes are not known.
    """

    def __init__(self, options: SourceOptions) -> None:
        options.require_gray_or_rgb("arrayrecord")
        root, pattern = Path(options.require_root("arrayrecord")), f"{options.split}-*.array_record"
        files = _shard_files(root, pattern)
        packed = read_packed_classes(root / f"{options.split}.json")
        if options.num_classes is None and packed is None:
            raise DataError(
                f"{root} does not name its classes: there is no {options.split}.json",
                "give num_classes",
            )
        self._records = open_records(files)
        self._fit = fit_name(options.fit)
        self.name = f"arrayrecord {root / pattern}"
        self.image_shape = options.image_shape
        if packed is None:
            self.num_classes = int(options.num_classes or 0)
            sizes = [f"{path.name} {path.stat().st_size}" for path in files]
            self.fingerprint = fingerprint(sizes)
        else:
            self.class_names, self.class_counts, digests = packed
            self.num_classes = len(self.class_names)
            self.fingerprint = fingerprint(digests)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        """Reads one record.

        Raises:
          UnreadableRecord: If the image is damaged.
          DataError: If the record is damaged.
        """
        import msgpack

        try:
            record = msgpack.unpackb(self._records[index])
            content, label = bytes(record["image"]), operator.index(record["label"])
        except (*RECORD_ERRORS, msgpack.UnpackException) as error:
            raise DataError(
                f"record {index} of {self.name} is damaged: {error!r}",
                "check the files with tools/prepare_imagenet.py --verify, or pack them again",
            ) from error
        size, _, channels = self.image_shape
        image = decode_image(content, f"{index} of {self.name}", size, channels, fit=self._fit)
        return {"image": image, "label": np.int32(label)}


def _shard_files(root: Path, pattern: str) -> list[Path]:
    """Returns the sorted files of a split.

    Raises:
      DataError: If there are none, or fewer than their names promise.
    """
    files = sorted(root.glob(pattern))
    if not files:
        raise DataError(
            f"no {pattern} in {str(root)!r}", "set config.data.root and config.data.split"
        )
    shards = re.search(r"-of-(\d+)\.array_record$", files[0].name)
    if shards and len(files) != int(shards[1]):
        raise DataError(
            f"{len(files)} files {pattern} in {str(root)!r}, but {files[0].name} is one of "
            f"{shards[1]}",
            "copy or pack them all, into an empty folder",
        )
    return files


def open_records(files: Sequence[Path]) -> grain.sources.ArrayRecordDataSource:
    """Opens ArrayRecord files as one sequence of byte strings.

    Raises:
      DataError: Naming a file that is no whole ArrayRecord file.
    """
    try:
        return grain.sources.ArrayRecordDataSource([str(path) for path in files])
    except (RuntimeError, ValueError, OSError) as error:
        raise DataError(
            f"{_first_damaged(files)} is not a whole ArrayRecord file: {error}",
            "copy or make it again",
        ) from error


def _first_damaged(files: Sequence[Path]) -> Path:
    for path in files:
        try:
            grain.sources.ArrayRecordDataSource([str(path)])
        except (RuntimeError, ValueError, OSError):
            return path
    return files[0]


def read_packed_classes(path: Path) -> tuple[list[str], list[int], list[str]] | None:
    """Reads class names, image counts by label and shard digests that were written beside shards.

    Args:
      path: The `SPLIT.json` of tools/prepare_imagenet.py, which may be missing.

    Returns:
      None if there is no file; without counts, as older files are, an empty list of them.

    Raises:
      DataError: If the file is damaged.
    """
    if not path.exists():
        return None
    try:
        found = read_json(path)
        names = [str(name) for name in found["class_names"]]
        shards = sorted(found["shards"].items())
        digests = [f"{name} {shard['digest']}" for name, shard in shards]
        counts = [shard["class_counts"] for _, shard in shards if "class_counts" in shard]
        totals = [sum(of_class) for of_class in zip(*counts, strict=True)]
        if len(counts) < len(shards):
            totals = []
        if totals and len(totals) != len(names):
            raise ValueError("its counts do not fit its class names")
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        DsrError,
    ) as error:
        raise DataError(
            f"{path} is damaged: {error!r}", "pack the images again, into an empty folder"
        ) from error
    return names, totals, digests


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


def write_records(
    path: Path, records: Iterable[bytes], finish: Callable[[Path], None] = lambda _: None
) -> None:
    """Writes one ArrayRecord file, which appears under its name only when it is whole and on disk.

    Args:
      path: The file.
      records: Its records.
      finish: Called with the whole file before it gets its name.

    Raises:
      StorageError: If it cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    with name_storage_errors(path), temporary_file(path) as temporary:
        # One record per compressed group: random access reads nothing that it does not need.
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        try:
            for record in records:
                with _storage_errors(path):
                    writer.write(record)
        finally:
            with _storage_errors(path):
                writer.close()
        finish(temporary)


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """Names the file in an error of ArrayRecord's writer, which raises none but RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise StorageError(
            f"{path} cannot be written: {error}",
            "free space on the disk, then run the same command again",
        ) from error


def count_records(path: Path) -> int:
    """Returns how many records an ArrayRecord file holds.

    Raises:
      DataError: If the file is damaged.
    """
    return len(open_records([path]))


class Tfds:
    """A prepared TensorFlow data set with the features "image" and "label".

    Args:
      options: `dataset`, for example "cifar10" or "imagenet2012:5.1.0"; `root`, where it was
        prepared, if not at TFDS's default; `split`, any of TFDS, for example "train" or
        "train[:90%]"; size, channels and `fit` of the images.

    Raises:
      DataError: If TFDS is missing, or the data set is not prepared there or has other features.
    """

    def __init__(self, options: SourceOptions) -> None:
        options.require_gray_or_rgb("tfds")
        dataset, folder = options.dataset, options.root or "its default folder"
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise DataError(
                f"data source 'tfds:{dataset}' needs tensorflow_datasets",
                "pip install tensorflow-datasets",
            ) from error
        try:
            self._records = tfds.data_source(
                dataset, split=options.split, data_dir=options.root or None, download=False
            )
        # TFDS raises its own kinds for names and splits, and protobuf's for damaged metadata.
        except Exception as error:
            raise DataError(
                f"TFDS cannot open {dataset!r}, split {options.split!r}, in {folder}: {error}",
                "prepare it with --file_format=array_record, and set config.data.root to its "
                "data_dir",
            ) from error
        features = self._records.dataset_info.features
        if not {"image", "label"} <= set(features) or not hasattr(features["label"], "names"):
            raise DataError(
                f"TFDS {dataset!r} in {folder} has the features {', '.join(features) or 'none'}",
                "choose a data set with an image and a class label",
            )
        self._fit = fit_name(options.fit)
        self.name = f"tfds {dataset} {options.split}"
        self._place = f"{self.name} in {folder}"
        self.num_classes = features["label"].num_classes
        self.class_names = list(features["label"].names)
        self.image_shape = options.image_shape

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        """Reads one record.

        Raises:
          DataError: If the record is damaged, or its image no array [H, W, C] of uint8 or uint16.
        """
        from PIL import Image

        try:
            record = self._records[index]
            pixels, label = record["image"], operator.index(record["label"])
        # As above: damaged records raise errors of TFDS, protobuf and ArrayRecord.
        except Exception as error:
            raise DataError(
                f"record {index} of {self._place} is damaged: {error!r}",
                "prepare the data set again",
            ) from error
        if pixels.dtype == np.uint16:
            pixels = (pixels >> 8).astype(np.uint8)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4):
            raise DataError(
                f"the images of {self._place} are arrays of {pixels.dtype} {list(pixels.shape)}",
                "choose another data set",
            )
        size, _, channels = self.image_shape
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        fitted = FITS[self._fit](to_mode(image, channels), size)
        return {"image": to_array(fitted), "label": np.int32(label)}
