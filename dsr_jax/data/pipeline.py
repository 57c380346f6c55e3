"""Batches as a pure function of (seed, step), on any number of hosts.

Order of operations, and why:

    shuffle, repeat     position in the endless stream -> record; each epoch is a permutation
    index, crop, flip   still before the stream is divided, so both are keyed by global position
    batch               row r of step s is position s * global_batch + r

A process reads the rows that its devices hold and no others; the global batch is the same on any
number of processes and any mesh. A resumed run starts at its step: there is no iterator state to
save.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from dsr_jax.core.errors import DataError
from dsr_jax.core.prompts import IGNORED
from dsr_jax.core.workers import end_with_parent
from dsr_jax.data.base import Record, Source, caption_length, check_label

HostBatch = dict[str, np.ndarray]

# Batches that wait to be used, per process; two are always allowed.
PREFETCH_BYTES = 2**30
MAX_THREADS = 8

_logger = logging.getLogger(__name__)


def make_batches(
    source: Source,
    seed: int,
    global_batch: int,
    *,
    start_step: int = 0,
    rows: Sequence[int] | np.ndarray | None = None,
    flip: bool = False,
    crop: int = 0,
    workers: int = 0,
) -> Iterator[HostBatch]:
    """Yields rows of the batches of steps start_step, start_step + 1, ... for ever.

    Each record comes once per epoch; a batch may cross the border of two epochs.

    Args:
      source: Images and labels.
      seed: Fixes order and flips, in [0, 2**32).
      global_batch: Samples per step over all processes.
      start_step: Steps done before: the step number of the restored state.
      rows: Rows [b] of each global batch to read; None for all. A process of several reads those
        that its devices hold (`parallel.shardings.process_rows`).
      flip: Mirror half of the images, left to right; not for captions, which may name sides.
      crop: Side of a square to crop at a random position; 0 takes images as they are.
      workers: Reader processes; 0 reads with threads of this process, which is right unless
        decoding is the bottleneck. With workers, the main module must be guarded by
        `if __name__ == "__main__"`.

    Returns:
      Iterator of "image" uint8 [b, H, W, C], "label" int32 [b] and "index" int64 [b], the sample's
      position in the run: step * global_batch + row in the global batch. Of captions, "tokens" and
      "targets" int32 [b, T] in place of the label.

    Raises:
      DataError: If a row is outside the batch, the source is empty, the seed out of range, or
        captioned images are to be mirrored; later, if a record cannot be read.
    """
    rows = _check_rows(rows, global_batch)
    _check_source(source, seed, global_batch, warn=0 in rows)
    if flip and caption_length(source):
        raise DataError(
            f"{source.name} cannot be mirrored: captions name left and right",
            "set config.data.flip=False",
        )
    checked = functools.partial(_check_record, source.name, source.num_classes)
    records = grain.MapDataset.source(source).map_with_index(checked)
    records = records.seed(seed).shuffle().repeat(None).map_with_index(_add_index)
    if crop:
        records = records.random_map(functools.partial(_crop, crop))
    if flip:
        records = records.random_map(_flip)
    # As many steps as positions fit into the 64 bits that Grain counts with.
    steps = grain.MapDataset.range(start_step, sys.maxsize // global_batch)
    batches = steps.map(functools.partial(_read_rows, records, rows, global_batch))
    dataset = batches.to_iter_dataset(_read_options(source, len(rows), workers))
    if workers:
        dataset = _in_processes(dataset, workers)
    return _closing(dataset)


def record_numbers(size: int, seed: int, positions: Iterable[int]) -> list[int]:
    """Returns the numbers of the records at some positions of the run, in the order of training.

    Args:
      size: Number of records of the source.
      seed: Seed of the order.
      positions: `index` of the samples in the batches of `make_batches`.
    """
    # The operations before the shuffle are those of `make_batches`, as Grain derives its seed from
    # their number.
    numbers = grain.MapDataset.range(size).map_with_index(lambda index, record: record)
    numbers = numbers.seed(seed).shuffle().repeat(None)
    return [int(numbers[position]) for position in positions]


def iterate_once(
    source: Source, batch_size: int, *, rows: Sequence[int] | np.ndarray | None = None
) -> Iterator[HostBatch]:
    """Yields rows of the batches of one ordered pass over `source`.

    The last batch is filled up with zeros, so that all batches have one shape and all processes
    take equally many.

    Args:
      source: Images and labels.
      batch_size: Records per batch over all processes.
      rows: Rows [b] of each batch to read, as in `make_batches`.

    Returns:
      Iterator of "image" uint8 [b, H, W, C], "label" int32 [b], "index" int64 [b], the record's
      number, and "mask" bool [b], False for padding.

    Raises:
      DataError: If a row is outside the batch; later, if a record cannot be read.
    """
    rows = _check_rows(rows, batch_size)
    padded = math.ceil(len(source) / batch_size) * batch_size
    records = grain.MapDataset.range(padded).map(functools.partial(_read_or_pad, source))
    steps = grain.MapDataset.range(padded // batch_size)
    batches = steps.map(functools.partial(_read_rows, records, rows, batch_size))
    return _closing(batches.to_iter_dataset(_read_options(source, len(rows), workers=0)))


def _check_source(source: Source, seed: int, global_batch: int, *, warn: bool) -> None:
    if len(source) == 0:
        raise DataError(f"{source.name} has no records", "check config.data.root and split")
    if not 0 <= seed < 2**32:
        raise DataError(f"data seed {seed} is out of range", "choose one in [0, 2**32)")
    if global_batch > len(source) and warn:
        _logger.warning(
            "a batch of %d holds some of the %d records of %s more than once",
            global_batch,
            len(source),
            source.name,
        )


def _in_processes(dataset: grain.IterDataset, workers: int) -> grain.IterDataset:
    """Reads in processes of their own."""
    # Grain reads its absl flags when it starts workers. Our entry points do not use absl, so
    # nothing has parsed them; where something has, this changes nothing.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    return dataset.mp_prefetch(options, worker_init_fn=end_with_parent)


def _check_rows(rows: Sequence[int] | np.ndarray | None, batch: int) -> np.ndarray:
    """Returns the rows [b] of a batch that are wanted, which must exist."""
    if batch <= 0:
        raise DataError(
            f"a global batch of {batch} is not possible", "use a positive number of samples"
        )
    wanted = np.arange(batch) if rows is None else np.asarray(rows, np.int64)
    if wanted.size == 0 or wanted.min() < 0 or wanted.max() >= batch:
        raise DataError(
            f"rows {wanted.tolist()[:8]} of a batch of {batch}", "ask for rows in [0, batch)"
        )
    return wanted


def _read_rows(
    records: grain.MapDataset, rows: np.ndarray, global_batch: int, step: int
) -> HostBatch:
    """Stacks the wanted rows of one step's batch."""
    read = [records[step * global_batch + int(row)] for row in rows]
    return {name: np.stack([record[name] for record in read]) for name in read[0]}


def _check_record(name: str, num_classes: int, index: int, record: Record) -> Record:
    if "label" in record:
        check_label(int(record["label"]), num_classes, index, name)
    return record


def _add_index(position: int, record: Record) -> dict[str, Any]:
    return {**record, "index": np.int64(position)}


def _crop(size: int, record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    image = record["image"]
    if min(image.shape[:2]) < size:
        raise DataError(
            f"an image of {image.shape[:2]} pixels is too small for squares of {size}",
            "set config.data.crop_from to at least config.data.image_size",
        )
    top, left = (int(rng.integers(side - size + 1)) for side in image.shape[:2])
    return {**record, "image": image[top : top + size, left : left + size]}


def _flip(record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    if rng.random() < 0.5:
        return {**record, "image": record["image"][:, ::-1]}
    return record


def _read_or_pad(source: Source, index: int) -> dict[str, Any]:
    real = index < len(source)
    record = source[index] if real else _padding(source)
    if "label" in record:
        check_label(int(record["label"]), source.num_classes, index, source.name)
    return {**record, "index": np.int64(index), "mask": np.bool_(real)}


def _padding(source: Source) -> Record:
    image = np.zeros(source.image_shape, np.uint8)
    if length := caption_length(source):
        return {
            "image": image,
            "tokens": np.zeros(length, np.int32),
            "targets": np.full(length, IGNORED, np.int32),
        }
    return {"image": image, "label": np.int32(0)}


def _read_options(source: Source, local_batch: int, workers: int) -> grain.ReadOptions:
    """Threads and buffers of one reader, in batches.

    Grain's default buffer of 500 elements is meant for records; 500 batches fill the memory.
    """
    readers = max(workers, 1)
    batch_bytes = local_batch * math.prod(source.image_shape)
    buffer = max(2, min(2 * MAX_THREADS, PREFETCH_BYTES // (batch_bytes * readers)))
    threads = max(1, min(MAX_THREADS, (os.cpu_count() or 1) // readers, buffer))
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)


def _closing(dataset: grain.IterDataset) -> Iterator[HostBatch]:
    """Iterates; ends threads and worker processes when the caller lets go of the iterator."""
    iterator = iter(dataset)
    try:
        yield from iterator
    finally:
        iterator.close()
