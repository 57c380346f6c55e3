"""Writers of metrics to metrics.jsonl and optionally to TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dsr_jax.core import files
from dsr_jax.core.errors import ConfigError
from dsr_jax.parallel.processes import is_process_zero

METRICS_FILE = "metrics.jsonl"

_logger = logging.getLogger(__name__)


class _Sink(Protocol):
    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def write_image(self, step: int, name: str, image: np.ndarray) -> None: ...

    def close(self) -> None: ...


class MetricWriter:
    """Writes metrics by step; a context manager.

    `workdir/metrics.jsonl` always gets one JSON object per call: {"step": 100, "loss": 0.5, ...},
    with null for what is no finite number. On opening, records that this run will write again are
    removed, so that steps never repeat nor run backwards, however often the run was resumed.

    Only process 0 writes; in the others every method does nothing.

    Args:
      workdir: The run's folder.
      first_step: The first step of this start; records from it on are removed. Records of the step
        before, such as scores, may still be added; one that is there already is not repeated.
      tensorboard: Also writes events to `workdir/tensorboard`.
      wandb: Project of Weights & Biases to write to; "" for none.
      config: Plain values shown there.
      process_zero: Whether this is process 0, which writes; None asks JAX.

    Raises:
      ConfigError: If a package that was asked for is not installed (in every process).
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        first_step: int = 0,
        tensorboard: bool = False,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
        process_zero: bool | None = None,
    ) -> None:
        folder = Path(workdir)
        check_packages(tensorboard, wandb)
        self._last_step = first_step - 1
        self._sinks: list[_Sink] = []
        if not (is_process_zero() if process_zero is None else process_zero):
            return
        self._sinks.append(_Jsonl(folder / METRICS_FILE, first_step))
        if tensorboard:
            self._sinks.append(_TensorBoard(folder / "tensorboard", first_step))
        if wandb:
            self._sinks.append(_Wandb(folder, wandb, config or {}))

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Writes scalars; those that are None are left out.

        Args:
          step: Not smaller than in the call before.
          metrics: Numbers, or arrays of one element, on the host.

        Raises:
          ValueError: If `step` runs backwards.
        """
        self._check_step(step)
        values = {name: float(value) for name, value in metrics.items() if value is not None}
        for sink in self._sinks:
            sink.write(step, values)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Shows a picture, uint8 [H, W, C], where pictures can be shown."""
        self._check_step(step)
        for sink in self._sinks:
            sink.write_image(step, name, image)

    def close(self) -> None:
        """Flushes and closes everything."""
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_step(self, step: int) -> None:
        if step < self._last_step:
            raise ValueError(f"metrics of step {step} after step {self._last_step}")
        self._last_step = step


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the whole records of a run's metrics.jsonl, in order; [] if there is none.

    Damaged lines, such as a last one that a crash cut short, are left out.
    """
    path = Path(workdir) / METRICS_FILE
    records = []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if type(record["step"]) is not int:
                raise ValueError("its step is no integer")
            records.append(record)
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            _logger.warning("%s: line %d is damaged (%s), left out", path, number, error)
    return records


def check_packages(tensorboard: bool, wandb: str) -> None:
    """Checks that the packages which `MetricWriter` would need are installed.

    Raises:
      ConfigError: Naming the setting and the package.
    """
    if tensorboard:
        _require("tensorboardX", "config.log.tensorboard=True")
    if wandb:
        _require("wandb", f"config.log.wandb={wandb}")


def _require(package: str, setting: str) -> None:
    spec = importlib.util.find_spec(package)
    # A folder of that name (wandb makes one) is found as a package without a file.
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"{setting} needs {package}, which is not installed",
            f"pip install {package}, or leave the setting out",
        )


class _Jsonl:
    """One JSON object per line, flushed at once."""

    def __init__(self, path: Path, first_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_metrics(path.parent) if record["step"] < first_step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        if path.exists() and path.read_bytes() != text.encode():
            files.write_atomic(path, text)
        self._path, self._before = path, first_step - 1
        self._there = {frozenset(each) for each in kept if each["step"] == self._before}
        with files.name_storage_errors(path):
            self._file = path.open("a")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        # NaN and infinity are no JSON; strict readers would stop at them.
        finite = {name: v if math.isfinite(v) else None for name, v in metrics.items()}
        if step == self._before and frozenset({"step", *finite}) in self._there:
            return
        with files.name_storage_errors(self._path):
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        del step, name, image

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    """Event files; records of steps from `first_step` on are hidden by TensorBoard itself."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """One W&B run per workdir: its ID is stored in `workdir/wandb_id` for resumes."""

    def __init__(self, workdir: Path, project: str, config: Mapping[str, Any]) -> None:
        import wandb

        path = workdir / "wandb_id"
        if not path.exists():
            files.write_atomic(path, uuid.uuid4().hex)
        self._wandb = wandb
        self._run = wandb.init(
            project=project,
            id=path.read_text(),
            name=workdir.absolute().name,
            dir=str(workdir),
            config=dict(config),
            resume="allow",
        )
        # W&B's own step refuses to go back, which a resume from an older checkpoint needs.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        self._run.log({"step": step, name: self._wandb.Image(image)})

    def close(self) -> None:
        self._run.finish()
