"""Memory of devices, and what a compiled program needs of it."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsr_jax.core.typing import PyTree
from dsr_jax.parallel.gpus import CARDS, Card
from dsr_jax.parallel.topologies import CHIPS, Chip

GIB = 2**30

RESERVE = 0.04
"""Fraction of a device's memory that no program is planned with: the allocator's fragments."""

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

FreeBytes = Callable[[Sequence[jax.Device]], int | None]
"""Function that returns the bytes that a program can allocate on each device; None if unknown."""


def free_bytes(devices: Sequence[jax.Device]) -> int | None:
    """Returns the bytes that a program can still allocate on each of this process's devices.

    Args:
      devices: Devices, of which those of other processes are left out.

    Returns:
      The smallest over the devices, or None without a limit, as on CPUs.
    """
    free = []
    for device in devices:
        if device.process_index != jax.process_index() or device.platform == "cpu":
            continue
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit") or _known_bytes(device.device_kind)
        if limit is not None:
            free.append(int(limit * (1 - RESERVE)) - stats.get("bytes_in_use", 0))
    return min(free, default=None)


def _known_bytes(kind: str) -> float | None:
    known: list[Chip | Card] = [*CHIPS.values(), *CARDS.values()]
    return next((chip.hbm_bytes for chip in known if chip.device_kind == kind), None)


def allocated_bytes(analysis: Any) -> int:
    """Returns the bytes that a program allocates on one device beside its arguments.

    Args:
      analysis: `compiled.memory_analysis()`.
    """
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    total = analysis.temp_size_in_bytes + max(results, 0) + analysis.generated_code_size_in_bytes
    peak = getattr(analysis, "peak_memory_in_bytes", 0) - analysis.argument_size_in_bytes
    return int(max(total, peak))


def bytes_per_chip(tree: PyTree) -> int:
    """Returns the bytes of one device's shards, for arrays or shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of the compiler or of a device means too little memory."""
    return "RESOURCE_EXHAUSTED" in str(error)


def out_of_memory(message: str, argument_bytes: int) -> tuple[int, int] | None:
    """Returns (bytes needed, bytes available) from XLA's out-of-memory message, else None.

    The compiler reports the total, or, if it gives up earlier, the temporaries alone.

    Args:
      message: Text of the exception.
      argument_bytes: Bytes of the program's arguments on one device.
    """
    size = r"([\d.]+)([KMGT])"
    patterns = {
        rf"Used {size} of {size} hbm": 0,
        rf"temporaries \({size}\) exceeds available HBM \({size}\)": argument_bytes,
    }
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern, more in patterns.items():
        if found := re.search(pattern, message):
            need, limit = (int(float(found[i]) * _UNITS[found[i + 1]]) for i in (1, 3))
            return need + more, limit
    return None


def smallest_of_processes(value: int) -> int:
    """Returns the smallest of the values that all processes pass; all must call."""
    if jax.process_count() == 1:
        return value
    # As bytes, since devices have no 64-bit integers.
    mine = np.frombuffer(np.int64(value).tobytes(), np.uint8)
    values = np.asarray(multihost_utils.process_allgather(mine, tiled=False), np.uint8)
    return int(values.reshape(-1, 8).view(np.int64).min())
