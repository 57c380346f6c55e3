"""Memory of a compiled program by what it is for, and what to do where it does not fit."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dsr_jax.core.typing import PyTree

GIB = 2**30
TEMPORARIES = "activations and temporaries"
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def bytes_per_chip(tree: PyTree) -> int:
    """Bytes of one device's part of abstract arrays that carry their shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def memory_parts(analysis: Any, arguments: Mapping[str, int]) -> dict[str, int]:
    """Bytes that a program needs on one device, by what they are for.

    Args:
      analysis: `compiled.memory_analysis()`.
      arguments: Bytes of its arguments by name; what the compiler says beyond them is padding.
    """
    padding = analysis.argument_size_in_bytes - sum(arguments.values())
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    parts = {
        **arguments,
        "padding of arguments": max(padding, 0),
        TEMPORARIES: analysis.temp_size_in_bytes,
        "results": max(results, 0),
        "program": analysis.generated_code_size_in_bytes,
    }
    return {name: int(size) for name, size in parts.items() if size}


def out_of_memory(message: str, argument_bytes: int) -> tuple[int, int] | None:
    """Bytes that were needed and that there are, from XLA's message; None if it says no such thing.

    The compiler says how much was used in the end, or, where it gives up earlier, what temporaries
    need beside the arguments.
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


@dataclass(frozen=True)
class Layout:
    """What decides how much memory a training step needs.

    Attributes:
      mesh: Devices along data, fsdp and tensor.
      width: Of the model, which FSDP splits.
      remat: config.model.remat.
      batch_per_chip: Images, of all micro-batches together.
      accumulate: Micro-batches; 0 in a sampler.
      state_bytes: Of parameters, averages and optimizer on one device.
      slices: Larger slices of these chips.
    """

    mesh: Mapping[str, int]
    width: int
    remat: str
    batch_per_chip: float
    accumulate: int
    state_bytes: int
    slices: Sequence[str] = ()


def advice(layout: Layout, needed: int, limit: int) -> list[str]:
    """What to change so that `needed` bytes become `limit`, what costs least time first."""
    found = []
    chips, fsdp = math.prod(layout.mesh.values()), layout.mesh["fsdp"]
    larger = [n for n in range(2 * fsdp, chips + 1, fsdp) if chips % n == layout.width % n == 0]
    whole = layout.state_bytes * fsdp
    enough = [n for n in larger if needed - layout.state_bytes + whole // n <= limit]
    if larger and layout.state_bytes > 0.1 * limit:
        best = enough[0] if enough else larger[-1]
        found.append(
            f"split the state over more chips: --config.mesh.data=-1 --config.mesh.fsdp={best} "
            f"makes its {_gib(layout.state_bytes)} a chip {_gib(whole // best)}"
        )
    stronger = {"none": ("dots", "full"), "dots": ("full",)}.get(layout.remat, ())
    for policy in stronger:
        cost = "some" if policy == "dots" else "a third more"
        found.append(
            f"keep less for the backward pass: --config.model.remat={policy} ({cost} compute)"
        )
    micro = layout.batch_per_chip / max(layout.accumulate, 1)
    if micro >= 2 and not layout.accumulate:
        found.append(f"draw fewer at a time: --config.sample.batch={int(micro * chips) // 2}")
    elif micro >= 2:
        found.append(
            f"work on fewer images at a time: --config.optim.accumulate={2 * layout.accumulate} "
            f"({micro / 2:g} instead of {micro:g} a chip), or a smaller config.data.global_batch"
        )
    if layout.slices:
        found.append(f"take more chips: --topology={layout.slices[0]}")
    return found


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
