"""Sweep over layouts of a config: compiles each without the devices, and ranks them."""

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

_MIN_FSDP = 4
"""Smallest FSDP size that is tried besides 1."""

_REMAT = ("none", "dots", "full")
"""From most memory and least compute to the opposite."""

_MICRO_BATCHES = (1, 2, 4, 8)

_FEW_IMAGES = 8
"""Images per chip below which `tensor` of 2 is tried."""


@dataclass(frozen=True)
class Trial:
    """One layout.

    Attributes:
      fsdp: Chips that share one state; the others hold replicas.
      remat: Rematerialization policy.
      accumulate: Micro-batches per step.
      tensor: Chips that share the heads and hidden units.
    """

    fsdp: int
    remat: str
    accumulate: int
    tensor: int = 1

    def dominates(self, other: "Trial") -> bool:
        """Whether it is `other` with fewer micro-batches, and so at least as fast.

        Remat policies have no such order: reading saved activations takes time, too.
        """
        return replace(other, accumulate=self.accumulate) == self and (
            self.accumulate <= other.accumulate
        )

    def overrides(self) -> list[str]:
        """Returns the layout as command-line arguments."""
        return [
            "--config.mesh.data=-1",
            f"--config.mesh.fsdp={self.fsdp}",
            f"--config.mesh.tensor={self.tensor}",
            f"--config.model.remat={self.remat}",
            f"--config.optim.accumulate={self.accumulate}",
        ]

    def apply(self, config: ConfigDict) -> ConfigDict:
        """Returns a copy of the config with this layout."""
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
    """Yields layouts in the order in which to try them, the cheapest in time first.

    Args:
      config: The config.
      topology: The slice.
      fsdp: Sizes to try; () for all that divide the chips and the width.
      remat: Policies to try; () for all.
      accumulate: Numbers of micro-batches to try; () for 1, 2, 4 and 8 as far as the batch goes.
      tensor: Sizes to try; () for 1, and 2 if chips have few images and heads are even.

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
    # FSDP stays within a slice, where links are fast.
    own = chips // topology.slices
    sizes = [n for n in range(1, own + 1) if own % n == config.model.hidden_size % n == 0]
    worthwhile = [n for n in sizes if n == 1 or n >= _MIN_FSDP]
    counts = [n for n in _MICRO_BATCHES if batch // chips % n == 0]
    shared = (1, 2) if batch // chips < _FEW_IMAGES and config.model.num_heads % 2 == 0 else (1,)
    choices = (fsdp or worthwhile, tensor or shared, remat or _REMAT, accumulate or counts)
    for shards, parts, policy, count in itertools.product(*choices):
        # A size that the user asked for is tried in any case: the mesh's error explains it.
        if tensor or parts == 1 or own % (shards * parts) == 0:
            yield Trial(shards, policy, count, parts)


def sweep(
    config: ConfigDict,
    topology: Topology,
    subject: dict[str, Any],
    chosen: Iterable[Trial],
    note: Callable[[str], None],
) -> list[Report]:
    """Compiles each layout and returns their reports, the fastest that fits first.

    Where a layout fits, the same with more micro-batches is skipped.

    Args:
      config: The config.
      topology: The slice.
      subject: See `programs.compile_report`.
      chosen: Layouts, from `trials`.
      note: Prints a line.
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
    """Returns one layout as a line of text."""
    gib = report["hbm_bytes_per_chip"] / 2**30
    seconds = report["step_seconds_estimate"]
    speed = f"{seconds:8.3f} s, MFU {report['mfu_bound']:6.1%}" if seconds else "    does not fit"
    return f"{gib:8.2f} GiB {speed:24}  {' '.join(report['overrides'])}"
