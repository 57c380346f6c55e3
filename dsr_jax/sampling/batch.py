"""Batch of a sampling job, found by the memory that the compiled sampler needs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from dsr_jax.core.errors import DeviceMemoryError
from dsr_jax.parallel.device_memory import (
    GIB,
    allocated_bytes,
    is_out_of_memory,
    smallest_of_processes,
)

AUTO = -1
"""Value of config.sample.batch for the largest batch that fits."""
DEFAULT_BATCH = 64
"""Samples made at once where memory has no known limit, or a training run shares it."""
MAX_BATCH = 1024
"""Largest batch that is looked for: a killed job loses one."""


@dataclass(frozen=True)
class BatchChoice:
    """Batch of a job.

    Attributes:
      size: Samples made at once over all devices.
      program: The sampler compiled for it.
      allocated: Bytes that it allocates on a device beside its arguments.
      free: Bytes that it may allocate there.
    """

    size: int
    program: Any
    allocated: int
    free: int

    def __str__(self) -> str:
        return (
            f"batch: {self.size} samples at once take {self.allocated / GIB:.2f} of "
            f"{self.free / GIB:.2f} GiB that are free on a device"
        )


def fixed_batch(value: int) -> int:
    """Returns config.sample.batch, or DEFAULT_BATCH for AUTO."""
    return DEFAULT_BATCH if value == AUTO else value


def whole_batch(count: int, devices: int) -> int:
    """Returns the smallest batch of at least `count` samples that divides over the devices."""
    return -(-count // devices) * devices


def find_batch(
    compile_for: Callable[[int], Any], num: int, devices: int, free: int, kept: int | None = None
) -> BatchChoice:
    """Returns the largest batch that fits: a power of two times the number of devices.

    Images do not depend on it. Two programs show what a sample takes; a third one is compiled for
    the batch that follows, and smaller ones where that does not fit. All processes must call.

    Args:
      compile_for: Compiles the sampler for a batch.
      num: Samples of the job; a larger batch is of no use.
      devices: Number of devices that the batch is split over.
      free: Bytes that the program may allocate on each device beside its arguments.
      kept: Batch of the job's earlier start, which is kept if it fits.

    Raises:
      DeviceMemoryError: If not even one sample on each device fits.
    """
    if kept and kept % devices == 0 and (choice := _try(compile_for, kept, free)):
        return choice
    sizes = [devices]
    while sizes[-1] < min(num, MAX_BATCH):
        sizes.append(2 * sizes[-1])
    first = max(i for i, size in enumerate(sizes) if size <= max(DEFAULT_BATCH, devices))
    for size in reversed(sizes[: first + 1]):
        if choice := _try(compile_for, size, free):
            break
    else:
        raise DeviceMemoryError(
            f"the sampler does not fit into the {free / GIB:.2f} GiB that are free on a device, "
            "not even with one sample on each",
            "end other programs on the device, use --config.precision.compute=bfloat16, or split "
            "the weights over more devices with --config.mesh.fsdp",
        )
    return _larger(compile_for, choice, sizes[first + 1 :] if size == sizes[first] else [])


def _larger(
    compile_for: Callable[[int], Any], choice: BatchChoice, sizes: list[int]
) -> BatchChoice:
    """Returns the largest of the increasing sizes that fits, else the choice of a smaller one."""
    # Until a second program shows it, a further sample is taken to need as much as the first ones.
    slope, known = choice.allocated / choice.size, False
    while sizes:
        most = (choice.free - choice.allocated) / max(slope, 1e-9) + choice.size
        likely = [size for size in sizes if size <= most]
        if known and not likely:
            break
        size = likely[-1] if likely else sizes[0]
        if larger := _try(compile_for, size, choice.free):
            slope = (larger.allocated - choice.allocated) / (larger.size - choice.size)
            choice, known = larger, True
            sizes = [other for other in sizes if other > size]
        else:
            sizes = [other for other in sizes if other < size]
    return choice


def _try(compile_for: Callable[[int], Any], size: int, free: int) -> BatchChoice | None:
    """Returns the choice of a batch, or None if it needs more than `free` on some process."""
    try:
        program = compile_for(size)
        allocated = allocated_bytes(program.memory_analysis())
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        program, allocated = None, free + 1
    fits = smallest_of_processes(int(allocated <= free))
    return BatchChoice(size, program, allocated, free) if fits else None
