"""Outlier statistics of the denoiser during training: config.log.outliers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsr_jax import build
from dsr_jax.config import ConfigDict
from dsr_jax.core.files import write_atomic
from dsr_jax.core.rng import normal_per_sample, sample_keys, stream_key
from dsr_jax.core.typing import Array, Batch, Params, PyTree
from dsr_jax.models.denoiser import Denoiser
from dsr_jax.parallel.processes import is_process_zero
from dsr_jax.parallel.shardings import fetch, replicated
from dsr_jax.registers.statistics import TokenMeasures, measure_denoiser, summarize
from dsr_jax.reports.outlier_records import (
    History,
    draw_noise_maps,
    draw_step_maps,
    extend_history,
    read_history,
    to_record,
)
from dsr_jax.reports.pictures import encode_png
from dsr_jax.spaces import InputSpace
from dsr_jax.telemetry.progress import announce_first_call
from dsr_jax.telemetry.writers import read_metrics
from dsr_jax.training.step import to_unit_range

FOLDER = "outliers"


class OutlierMonitor:
    """Measures a small batch of the training data at fixed noise levels.

    The batch is the beginning of the first one, with its own noise, so that steps and starts of a
    run compare, and nothing that training depends on is read or changed.

    Args:
      config: The run's config.
      workdir: Folder of the run.
      model: The denoiser.
      space: The input space.
      variables: Its frozen arrays.
      batches: Result of `build.global_batches`.
      mesh: Mesh of devices.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        model: Denoiser,
        space: InputSpace,
        variables: PyTree,
        batches: Callable[[int], Iterator[Batch]],
        mesh: Mesh,
    ) -> None:
        section = config.log
        self._times = tuple(float(time) for time in section.outlier_times)
        # A multiple of the devices, which divide samples evenly.
        self._count = min(
            -(-section.outlier_images // mesh.size) * mesh.size, config.data.global_batch
        )
        self._folder, self._workdir = workdir / FOLDER, workdir
        self._variables, self._batches = variables, batches
        self._batch: Batch | None = None
        self._history: History | None = None
        self._has_read = False
        measure = jax.jit(make_measure(config, model, space), out_shardings=replicated(mesh))
        self._measure = announce_first_call(measure, "the outlier statistics")

    def __call__(self, step: int, state: Any) -> dict[str, float | np.ndarray]:
        """Returns the statistics and pictures of a step; writes the pictures to the folder."""
        found = [summarize(measures) for measures in self._measures(state.params)]
        record = to_record(self._times, found)
        history = self._extended(step, record)
        pictures = {
            f"{FOLDER}/noise": draw_noise_maps(history),
            f"{FOLDER}/steps": draw_step_maps(history),
        }
        if is_process_zero():
            for name, path in (("noise", f"noise_{step:08d}.png"), ("steps", "steps.png")):
                write_atomic(self._folder / path, encode_png(pictures[f"{FOLDER}/{name}"]))
        return {**record, **pictures}

    def _measures(self, params: Params) -> Iterator[TokenMeasures]:
        if self._batch is None:
            batches = self._batches(0)
            first = next(batches)
            if hasattr(batches, "close"):
                batches.close()
            self._batch = jax.jit(lambda batch: {k: x[: self._count] for k, x in batch.items()})(
                dict(first)
            )
        for time in self._times:
            yield fetch(self._measure(params, self._variables, self._batch, jnp.float32(time)))

    def _extended(self, step: int, record: dict[str, float]) -> History:
        """Returns the run's statistics so far, this step's included."""
        if not self._has_read:
            self._history = read_history(read_metrics(self._workdir))
            self._has_read = True
        new = read_history([{"step": step, **record}])
        assert new is not None, "the outlier share is always finite"
        self._history = extend_history(self._history, new)
        return self._history


def make_measure(
    config: ConfigDict, model: Denoiser, space: InputSpace
) -> Callable[[Params, PyTree, Batch, Array], TokenMeasures]:
    """Returns the function `(params, variables, batch, t) -> TokenMeasures`, to be compiled.

    Args:
      config: The run's config.
      model: The denoiser.
      space: The input space.
    """
    path = build.make_objective(config).path

    def measure(params: Params, variables: PyTree, batch: Batch, t: Array) -> TokenMeasures:
        x, conditions = noised_latents(config.seed, path.interpolate, space, variables, batch, t)
        return measure_denoiser(model, params, x, jnp.full(len(x), t), conditions)

    return measure


def noised_latents(
    seed: int,
    interpolate: Callable[[Array, Array, Array], tuple[Array, Array]],
    space: InputSpace,
    variables: PyTree,
    batch: Batch,
    t: Array,
) -> tuple[Array, Array]:
    """Returns a batch's latents at noise level t [B, h, w, C], and its labels [B], of text its
    tokens [B, L].

    Noise depends on the seed and the samples' indices alone, not on t.

    Args:
      seed: Seed of the noise.
      interpolate: `diffusion.paths.Path.interpolate`.
      space: The input space.
      variables: Its frozen arrays.
      batch: Rows of a batch.
      t: The noise level, a scalar.
    """
    keys = [
        sample_keys(stream_key(seed, stream), batch["index"])
        for stream in ("outliers_encode", "outliers_noise")
    ]
    latents = space.encode(variables, to_unit_range(batch["image"]), keys[0]).astype(jnp.float32)
    noise = normal_per_sample(keys[1], latents.shape[1:])
    conditions = batch["tokens"] if "tokens" in batch else batch["label"]
    return interpolate(latents, noise, jnp.full(len(latents), t))[0], conditions
