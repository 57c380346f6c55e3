"""Roofline model: lower bounds of a program's time, from FLOPs, memory traffic, communication."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from dsr_jax.parallel.gpus import Card
from dsr_jax.parallel.topologies import Chip
from dsr_jax.planning.program_cost import Part

_COUNTED = (
    "Operations, bytes and collectives are counted in the compiled program, the body of each loop "
    "as often as the loop runs. "
)
_LEFT_OUT = (
    "What this leaves out: time to start {}, vector work, matmuls of odd shapes or in float32, "
    "input."
)
METHODS: Mapping[str, str] = MappingProxyType(
    {
        "tpu": _COUNTED
        + "Arrays in HBM count with the padding of their tiles, splash's kernels by the shapes "
        "that go in. The time of a part is the longest of these: its matmuls at the chip's "
        "bfloat16 peak, its traffic with HBM at full bandwidth, its collectives one after the "
        "other around rings of the torus, and between slices, if there are several, around a ring "
        "of slices at the chip's share of its host's network; the parts follow each other. "
        + _LEFT_OUT.format("collectives"),
        "gpu": _COUNTED
        + "Operands and results of each kernel count as bytes through memory, whether or not they "
        "are in the L2 cache; matmuls of cuBLAS and attention of cuDNN count by their shapes. The "
        "time of a part is the longest of these: its matmuls at the GPU's bfloat16 peak, its "
        "traffic with memory at full bandwidth, its collectives one after the other over NVLink, "
        "and between nodes, if there are several, over one network adapter for each GPU; the "
        "parts follow each other. The program is compiled without autotuning, which needs a GPU, "
        "and with matmuls by cuBLAS alone. " + _LEFT_OUT.format("kernels and collectives"),
    }
)
"""How the figures of a report were found, by platform."""


@dataclass(frozen=True)
class PartTime:
    """Lower bounds of a part's time, in seconds.

    Attributes:
      part: Part of the program.
      compute: Time of its matmuls.
      hbm: Time of its memory traffic.
      ici: Time of its communication within a slice, or within a node of GPUs.
      dcn: Time of its communication between slices or nodes.
    """

    part: Part
    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def seconds(self) -> float:
        """Maximum of the four times, which overlap at best."""
        return max(self.compute, self.hbm, self.ici, self.dcn)

    @property
    def bound(self) -> str:
        """Name of the longest of the four times."""
        return max(("compute", "hbm", "ici", "dcn"), key=lambda name: getattr(self, name))


def part_times(parts: Sequence[Part], chip: Chip | Card) -> list[PartTime]:
    """Returns the time bounds of a program's parts on a chip or GPU."""
    return [
        PartTime(
            part,
            compute=part.cost.flops / chip.peak_flops,
            hbm=part.cost.hbm_bytes / chip.hbm_bandwidth,
            ici=part.cost.wire_bytes / chip.ici_bandwidth,
            dcn=part.cost.dcn_bytes / chip.dcn_bandwidth,
        )
        for part in parts
    ]
