"""Sweep over layouts of a config: compiles each without its devices, and ranks them."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsr_jax import build
from dsr_jax.config import ConfigDict
from dsr_jax.core.errors import MeshError
from dsr_jax.parallel.topologies import AnyTopology
from dsr_jax.planning.programs import compile_report
from dsr_jax.planning.report import Report

_MIN_FSDP = 4
"""Smallest FSDP size to try, apart from 1."""

_REMAT = ("none", "dots", "full")
"""Policies from most memory and least compute to least memory and most compute."""

_MICRO_BATCHES = (1, 2, 4, 8)

_FEW_IMAGES = 8
"""Number of images per chip below which `tensor` of 2 is tried."""


@dataclass(frozen=True)
class Trial:
    """Layout to try.

    Attributes:
      fsdp: Number of chips over which one state is sharded; other chips have replicas.
      remat: Rematerialization policy.
      accumulate: Number of micro-batches per step.
      tensor: Number of chips over which heads and hidden units are sharded.
    """

    fsdp: int
    remat: str
    accumulate: int
    tensor: int = 1

    def dominates(self, other: "Trial") -> bool:
        """Whether it is `other` with as many or fewer micro-batches, and so at least as fast.

        Remat policies are not ordered by speed, since reading saved activations also takes time.
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
    topology: AnyTopology,
    fsdp: Sequence[int] = (),
    remat: Sequence[str] = (),
    accumulate: Sequence[int] = (),
    tensor: Sequence[int] = (),
) -> Iterator[Trial]:
    """Yields layouts in the order in which to try them, the cheapest in time first.

    Args:
      config: Experiment config.
      topology: Chips to compile for.
      fsdp: Sizes to try; () for all that divide the number of chips and the width.
      remat: Policies to try; () for all that the denoiser has.
      accumulate: Numbers of micro-batches to try; () for those of 1, 2, 4 and 8 that divide the
        images per chip.
      tensor: Sizes to try; () for 1, and also 2 if chips have few images and heads are even.

    Raises:
      MeshError: If the number of chips does not divide the global batch.
    """
    chips, batch = topology.num_chips, config.data.global_batch
    if batch % chips:
        nearest = max(1, round(batch / chips)) * chips
        raise MeshError(
            f"config.data.global_batch={batch} is not a multiple of {chips} chips",
            f"use --config.data.global_batch={nearest}",
        )
    # FSDP stays within a slice, which has fast links.
    own = chips // topology.slices
    sizes = [n for n in range(1, own + 1) if own % n == config.model.hidden_size % n == 0]
    worthwhile = [n for n in sizes if n == 1 or n >= _MIN_FSDP]
    counts = [n for n in _MICRO_BATCHES if batch // chips % n == 0]
    shared = (1, 2) if batch // chips < _FEW_IMAGES and config.model.num_heads % 2 == 0 else (1,)
    policies = _REMAT if build.has_policy(config) else (config.model.remat,)
    choices = (fsdp or worthwhile, tensor or shared, remat or policies, accumulate or counts)
    for shards, parts, policy, count in itertools.product(*choices):
        # A size that the user gave is always tried: if it does not fit, the mesh's error explains.
        if tensor or parts == 1 or own % (shards * parts) == 0:
            yield Trial(shards, policy, count, parts)


def sweep(
    config: ConfigDict,
    topology: AnyTopology,
    subject: dict[str, Any],
    chosen: Iterable[Trial],
    note: Callable[[str], None],
) -> list[Report]:
    """Compiles each layout and returns the reports, the fastest layout that fits first.

    If a layout fits, the same layout with more micro-batches is skipped.

    Args:
      config: Experiment config.
      topology: Chips to compile for.
      subject: First fields of each report; see `programs.compile_report`.
      chosen: Layouts from `trials`.
      note: Function that prints a line.
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
    """Returns the line of text about one layout."""
    gib = report["hbm_bytes_per_chip"] / 2**30
    seconds = report["step_seconds_estimate"]
    speed = f"{seconds:8.3f} s, MFU {report['mfu_bound']:6.1%}" if seconds else "    does not fit"
    return f"{gib:8.2f} GiB {speed:24}  {' '.join(report['overrides'])}"
