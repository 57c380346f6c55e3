"""How long a compiled program takes at least, from what its parts compute, move and send."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsr_jax.parallel.topologies import Chip
from dsr_jax.planning.program_cost import Part

METHOD = (
    "Operations, bytes and collectives are counted in the compiled program, the body of each loop "
    "as often as the loop runs, arrays in HBM with the padding of their tiles, splash's kernels by "
    "the shapes that go in. The time of a part is the longest of these: its matrix products at "
    "the chip's bfloat16 peak, its traffic with HBM at full bandwidth, its collectives one after "
    "the other around rings of the torus, and between slices, if there are several, around a ring "
    "of slices at the chip's share of its host's network; the parts follow each other. "
    "What this leaves out: time to start collectives, vector work, products of odd shapes or in "
    "float32, input."
)


@dataclass(frozen=True)
class PartTime:
    """Least times of a part, in seconds.

    Attributes:
      part: The part.
      compute: Of its matrix products.
      hbm: Of its traffic with the chip's memory.
      ici: Of its communication within a slice.
      dcn: Of its communication with other slices.
    """

    part: Part
    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def seconds(self) -> float:
        """The longest of them, which overlap at best."""
        return max(self.compute, self.hbm, self.ici, self.dcn)

    @property
    def bound(self) -> str:
        """Which one that is."""
        return max(("compute", "hbm", "ici", "dcn"), key=lambda name: getattr(self, name))


def part_times(parts: Sequence[Part], chip: Chip) -> list[PartTime]:
    """Times of the parts of a program on a chip."""
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
