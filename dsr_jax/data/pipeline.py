"""Batches as a pure function of (seed, step), on any number of hosts.

Order of operations, and why:

    shuffle, repeat     position in the endless stream -> record; each epoch is a permutation
    index, crop, flip   still before the stream is divided, so both are keyed by global position
    batch, [p + n*s::n] local batch number s*n + p is the p-th of n equal pieces of step s

So process p of n holds rows p*b .. (p+1)*b of the global batch, which is the same array on 1, 2 or
4 hosts. A resumed run starts the slice at its step: there is no iterator state to save.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from dsr_jax.core.errors import DataError
from dsr_jax.data.base import Record, Source

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
    process_index: int = 0,
    process_count: int = 1,
    flip: bool = False,
    crop: int = 0,
    workers: int = 0,
) -> Iterator[HostBatch]:
    """Yields this process's part of the batches of steps start_step, start_step + 1, ... for ever.

    Each record comes once per epoch; a batch may lie across the border of two epochs.

    Args:
      source: Images and labels.
      seed: Fixes order and flips, in [0, 2**32).
      global_batch: Samples per step over all processes.
      start_step: Steps done before: the step number of the restored state.
      process_index: This process.
      process_count: Processes that read together.
      flip: Mirror half of the images, left to right.
      crop: Side of a square to cut at a random place; 0 takes images as they are.
      workers: Reader processes; 0 reads with threads of this process, which is right unless
        decoding is the bottleneck. With workers, the main module must be guarded by
        `if __name__ == "__main__"`.

    Returns:
      Iterator of "image" uint8 [b, H, W, C], "label" int32 [b] and "index" int64 [b], the sample's
      position in the run: step * global_batch + place in the global batch.

    Raises:
      DataError: If the batch cannot be divided by the processes, the source is empty or the seed
        out of range; later, if a record cannot be read.
    """
    local_batch = _local_batch(global_batch, process_index, process_count)
    _check_source(source, seed, global_batch, warn=process_index == 0)
    records = grain.MapDataset.source(source).seed(seed).shuffle().repeat(None)
    records = records.map_with_index(_add_index)
    if crop:
        records = records.random_map(functools.partial(_crop, crop))
    if flip:
        records = records.random_map(_flip)
    first = process_index + process_count * start_step
    # The stream has no remainder; Grain's length of an endless one overflows without this.
    batches = records.batch(local_batch, drop_remainder=True)[first::process_count]
    dataset = batches.to_iter_dataset(_read_options(source, local_batch, workers))
    if workers:
        dataset = _in_processes(dataset, workers)
    return _closing(dataset)


def iterate_once(
    source: Source, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[HostBatch]:
    """Yields this process's part of one ordered pass over `source`.

    The last batch is filled up with zeros, so that all batches have one shape and all processes
    take equally many.

    Args:
      source: Images and labels.
      batch_size: Records per batch over all processes.
      process_index: This process.
      process_count: Processes that read together.

    Returns:
      Iterator of "image" uint8 [b, H, W, C], "label" int32 [b], "index" int64 [b], the record's
      number, and "mask" bool [b], False for padding.

    Raises:
      DataError: If the batch cannot be divided by the processes; later, if a record cannot be read.
    """
    local_batch = _local_batch(batch_size, process_index, process_count)
    padded = math.ceil(len(source) / batch_size) * batch_size
    records = grain.MapDataset.range(padded).map(functools.partial(_read_or_pad, source))
    batches = records.batch(local_batch)[process_index::process_count]
    return _closing(batches.to_iter_dataset(_read_options(source, local_batch, workers=0)))


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
    return dataset.mp_prefetch(options)


def _local_batch(batch: int, process_index: int, process_count: int) -> int:
    if batch <= 0 or batch % process_count:
        raise DataError(
            f"a global batch of {batch} cannot be divided by {process_count} processes",
            f"use a multiple of {process_count}",
        )
    if not 0 <= process_index < process_count:
        raise DataError(f"process {process_index} of {process_count}", "count from 0")
    return batch // process_count


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
    return {**record, "index": np.int64(index), "mask": np.bool_(real)}


def _padding(source: Source) -> Record:
    return {"image": np.zeros(source.image_shape, np.uint8), "label": np.int32(0)}


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
