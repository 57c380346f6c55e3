"""Tries layouts of a config on a TPU slice, without the slice, and ranks them."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsr_jax.config import ConfigDict
from dsr_jax.core.errors import MeshError
from dsr_jax.parallel.topologies import Topology
from dsr_jax.planning.programs import compile_report
from dsr_jax.planning.report import Report

_LEAST_FSDP = 4
"""Of fewer shards, only one is worth a try."""

_REMAT = ("none", "dots", "full")
"""From what keeps most and computes least to the opposite."""

_MICRO_BATCHES = (1, 2, 4, 8)

_FEW_IMAGES = 8
"""Images of a chip below which it is worth a try to let two chips share them, and the weights."""


@dataclass(frozen=True)
class Trial:
    """One layout.

    Attributes:
      fsdp: Chips that share a state; the rest of the slice are copies.
      tensor: Chips that share the heads and hidden units of the same images.
      remat: What the backward pass recomputes.
      accumulate: Micro-batches of a step, which make the batch that a chip works on smaller.
    """

    fsdp: int
    remat: str
    accumulate: int
    tensor: int = 1

    def dominates(self, other: "Trial") -> bool:
        """Whether it is the other with fewer micro-batches, and so as fast or faster.

        Of rematerialisation this cannot be said: reading what was kept takes time, too.
        """
        return replace(other, accumulate=self.accumulate) == self and (
            self.accumulate <= other.accumulate
        )

    def overrides(self) -> list[str]:
        """The layout as arguments of a command."""
        return [
            "--config.mesh.data=-1",
            f"--config.mesh.fsdp={self.fsdp}",
            f"--config.mesh.tensor={self.tensor}",
            f"--config.model.remat={self.remat}",
            f"--config.optim.accumulate={self.accumulate}",
        ]

    def apply(self, config: ConfigDict) -> ConfigDict:
        """A copy of the config in this layout."""
        changed = config.copy_and_resolve_references()
        changed.mesh.update(data=-1, fsdp=self.fsdp, tensor=self.tensor)
        changed.model.remat = self.remat
        changed.optim.accumulate = self.accumulate
        return changed


def trials(
    config: ConfigDict,
    topology: Topology,
    fsdp: Sequence[int] = (),
    remat: Sequence[str] = (),
    accumulate: Sequence[int] = (),
    tensor: Sequence[int] = (),
) -> Iterator[Trial]:
    """Layouts in the order in which to try them: what costs least time first.

    Args:
      config: The config.
      topology: The slice.
      fsdp: Sizes to try; () for all that divide the chips and the width.
      remat: Policies to try; () for all.
      accumulate: Numbers of micro-batches to try; () for 1, 2, 4 and 8 as far as the batch goes.
      tensor: Sizes to try; () for 1 and, where a chip has few images and the heads are even, 2.

    Raises:
      MeshError: If the batch does not divide over the chips.
    """
    chips, batch = topology.num_chips, config.data.global_batch
    if batch % chips:
        nearest = max(1, round(batch / chips)) * chips
        raise MeshError(
            f"global batch {batch} does not divide over {chips} chips",
            f"use --config.data.global_batch={nearest}",
        )
    # A state is shared within a slice, whose links are the fast ones.
    own = chips // topology.slices
    sizes = [n for n in range(1, own + 1) if own % n == config.model.hidden_size % n == 0]
    worthwhile = [n for n in sizes if n == 1 or n >= _LEAST_FSDP]
    counts = [n for n in _MICRO_BATCHES if batch // chips % n == 0]
    shared = (1, 2) if batch // chips < _FEW_IMAGES and config.model.num_heads % 2 == 0 else (1,)
    choices = (fsdp or worthwhile, tensor or shared, remat or _REMAT, accumulate or counts)
    for shards, parts, policy, count in itertools.product(*choices):
        # What the user asks for is not left out in silence: the mesh says why it is impossible.
        if tensor or parts == 1 or own % (shards * parts) == 0:
            yield Trial(shards, policy, count, parts)


def sweep(
    config: ConfigDict,
    topology: Topology,
    subject: dict[str, Any],
    chosen: Iterable[Trial],
    note: Callable[[str], None],
) -> list[Report]:
    """Compiles each layout, and returns their reports, the fastest that fits first.

    What cannot be better is not compiled: where a layout fits, more micro-batches only cost time.

    Args:
      config: The config.
      topology: The slice.
      subject: See `ahead.compile_report`.
      chosen: Layouts, from `trials`.
      note: Shows a line to the user.
    """
    reports: list[Report] = []
    fitting: list[Trial] = []
    for trial in chosen:
        if any(better.dominates(trial) for better in fitting):
            continue
        report = compile_report(trial.apply(config), topology, "train", subject)
        report["overrides"] = trial.overrides()
        reports.append(report)
        note(line(report))
        if report["fits"]:
            fitting.append(trial)
    return sorted(reports, key=lambda report: report["step_seconds_estimate"] or math.inf)


def line(report: Report) -> str:
    """One layout in one line."""
    gib = report["hbm_bytes_per_chip"] / 2**30
    seconds = report["step_seconds_estimate"]
    speed = f"{seconds:8.3f} s, MFU {report['mfu_bound']:6.1%}" if seconds else "    does not fit"
    return f"{gib:8.2f} GiB {speed:24}  {' '.join(report['overrides'])}"
