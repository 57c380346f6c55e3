"""Memory of a compiled program by purpose, and advice for programs that do not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsr_jax.parallel.device_memory import bytes_per_chip as bytes_per_chip
from dsr_jax.parallel.device_memory import out_of_memory as out_of_memory
from dsr_jax.parallel.gpus import MAX_FRACTION, Card, memory_fraction

GIB = 2**30
TEMPORARIES = "activations and temporaries"


def memory_parts(analysis: Any, arguments: Mapping[str, int]) -> dict[str, int]:
    """Returns the bytes that a program needs on one device, by purpose.

    Args:
      analysis: `compiled.memory_analysis()`.
      arguments: Bytes of the arguments by name; the compiler's total minus these is padding.
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


@dataclass(frozen=True)
class Layout:
    """Quantities that determine the memory of a training step.

    Attributes:
      mesh: Number of devices along data, fsdp and tensor.
      width: Hidden size of the model, which FSDP splits.
      remat: Value of config.model.remat.
      batch_per_chip: Images per chip, over all micro-batches.
      accumulate: Micro-batches; 0 in a sampler.
      state_bytes: Bytes of parameters, EMA weights and optimizer state on one device.
      slices: Names of larger slices of these chips.
    """

    mesh: Mapping[str, int]
    width: int
    remat: str
    batch_per_chip: float
    accumulate: int
    state_bytes: int
    slices: Sequence[str] = ()


def advice(layout: Layout, needed: int, limit: int, temporaries: int) -> list[str]:
    """Returns config changes that reduce `needed` bytes to `limit`, the cheapest in time first.

    Args:
      layout: Quantities that determine the memory.
      needed: Bytes needed on one chip.
      limit: Bytes available.
      temporaries: Bytes of activations and temporaries among those needed.
    """
    found = []
    chips, fsdp = math.prod(layout.mesh.values()), layout.mesh["fsdp"]
    larger = [n for n in range(2 * fsdp, chips + 1, fsdp) if chips % n == layout.width % n == 0]
    whole = layout.state_bytes * fsdp
    enough = [n for n in larger if needed - layout.state_bytes + whole // n <= limit]
    if larger and layout.state_bytes > 0.1 * limit:
        best = enough[0] if enough else larger[-1]
        found.append(
            f"shard the state over more chips: --config.mesh.data=-1 --config.mesh.fsdp={best} "
            f"reduces its {_gib(layout.state_bytes)} per chip to {_gib(whole // best)}"
            f"{_outcome(needed - layout.state_bytes + whole // best, limit)}"
        )
    stronger = {"none": ("dots", "full"), "dots": ("full",)}.get(layout.remat, ())
    for policy in stronger:
        cost = "some" if policy == "dots" else "a third more"
        found.append(
            f"save fewer activations for the backward pass: --config.model.remat={policy} "
            f"({cost} compute)"
        )
    micro = layout.batch_per_chip / max(layout.accumulate, 1)
    if micro >= 2 and not layout.accumulate:
        found.append(
            f"sample fewer images at a time: --config.sample.batch={int(micro * chips) // 2}"
        )
    elif micro >= 2:
        found.append(_smaller_micro_batches(layout, needed, limit, temporaries))
    if layout.slices:
        found.append(f"use more chips: --topology={layout.slices[0]}")
    return found


def gpu_advice(card: Card, needed: int) -> list[str]:
    """Returns how JAX can take more of a GPU's memory than it does, if it can.

    Args:
      card: The GPU.
      needed: Bytes needed on it.
    """
    most = int(MAX_FRACTION * card.memory_bytes)
    if card.hbm_bytes >= most:
        return []
    return [
        f"let JAX take more of the GPU's memory, here and in the run: set the environment variable "
        f"{memory_fraction()[0]}={MAX_FRACTION}{_outcome(needed, most)}"
    ]


def _smaller_micro_batches(layout: Layout, needed: int, limit: int, temporaries: int) -> str:
    """Returns advice on micro-batches, with temporaries proportional to their size."""
    images = layout.batch_per_chip
    counts = [
        layout.accumulate * factor
        for factor in (2, 4, 8, 16, 32, 64)
        if images % (layout.accumulate * factor) == 0
    ] or [2 * layout.accumulate]
    estimates = {n: needed - temporaries + temporaries * layout.accumulate // n for n in counts}
    best = next((n for n, size in estimates.items() if size <= limit), counts[-1])
    return (
        f"process fewer images at a time: --config.optim.accumulate={best} "
        f"({images / best:g} instead of {images / layout.accumulate:g} per chip), or a smaller "
        f"config.data.global_batch{_outcome(estimates[best], limit)}"
    )


def _outcome(size: int, limit: int) -> str:
    """Returns the end of a line of advice: whether the change is estimated to be enough."""
    enough = "enough" if size <= limit else "not enough by itself"
    return f"; {enough}: about {_gib(size)} of {_gib(limit)} in all"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
