"""Evaluation during a decoder's training: pictures, PSNR, SSIM, and at the end the decoder."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import NamedSharding

from dsr_jax import build
from dsr_jax.build.rae import file_digests
from dsr_jax.config import ConfigDict
from dsr_jax.convert.decoder import save_decoder
from dsr_jax.core.files import rename_synced, write_json
from dsr_jax.core.typing import Array, Params, PyTree
from dsr_jax.data.pipeline import iterate_once
from dsr_jax.evaluation.reconstruction import psnr, ssim
from dsr_jax.models.decoder import DecoderConfig
from dsr_jax.parallel.processes import is_process_zero, log
from dsr_jax.parallel.shardings import (
    check_row_order,
    fetch,
    host_to_global,
    process_rows,
)
from dsr_jax.sampling.batch import fixed_batch, whole_batch
from dsr_jax.sampling.images import save_png_grid
from dsr_jax.telemetry.writers import read_metrics
from dsr_jax.training.loop import Summary
from dsr_jax.training.state import TrainState

COLUMNS = 8
"""Images per row of a picture."""


class Reconstructions:
    """Reconstructs held-out images with a run's weights and records the result.

    Args:
      config: The run's config.
      workdir: Folder of the run.
      reconstruct: Result of `build.make_reconstruct`.
      variables: Frozen arrays.
      sizes: The decoder's.
      sharding: Sharding of batches.

    Raises:
      DataError: If there are no held-out images.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        reconstruct: Callable[[Params, PyTree, Array], Array],
        variables: PyTree,
        sizes: DecoderConfig,
        sharding: NamedSharding,
    ) -> None:
        self.config, self.workdir = config, workdir
        self._reconstruct, self._variables = reconstruct, variables
        self._sizes, self._sharding = sizes, sharding
        self._source = build.make_source(config, config.eval.split)
        self._count = min(config.eval.num_samples, len(self._source))
        self._last: tuple[int, dict[str, float]] = (-1, {})

    def report(self, step: int, state: TrainState) -> dict[str, float]:
        """Writes held-out images above their reconstructions; returns their PSNR and SSIM."""
        inputs, outputs = self._pairs(state.weights(self.config.sample.ema))
        scores = {}
        if is_process_zero() and self._count:
            path = self.workdir / "samples" / f"step_{step:08d}.png"
            save_pairs(path, *(x[: self.config.sample.num] for x in (inputs, outputs)))
            scores = {
                "heldout_psnr": float(psnr(inputs, outputs).mean()),
                "heldout_ssim": float(ssim(inputs, outputs).mean()),
            }
        self._last = (step, scores)
        return scores

    def finish(self, summary: Summary) -> None:
        """Writes the decoder as a converted folder, and summary.json."""
        config = self.config
        done, scores = self._last
        if done != summary.step:
            scores = self.report(summary.step, summary.state)
        params = fetch(summary.state.weights(self.config.sample.ema))
        if not is_process_zero():
            return
        folder = self.workdir / f"decoder_{summary.step:08d}"
        self._export(folder, params, summary.step, replace=summary.steps_here > 0)
        losses = [r["loss"] for r in read_metrics(self.workdir) if "loss" in r]
        record = {
            "steps": summary.step,
            "train_seconds": round(summary.seconds, 1),
            "loss": losses[-1] if losses else None,
            "ema": config.sample.ema,
            "heldout_images": self._count,
            "decoder": folder.name,
        }
        path = self.workdir / "summary.json"
        write_json(path, {**scores, **record})
        if scores:
            log(
                f"{self._count} held-out images: PSNR {scores['heldout_psnr']:.2f} dB, "
                f"SSIM {scores['heldout_ssim']:.4f}"
            )
        log(
            f"pictures: {self.workdir / 'samples'}; summary: {path}\n"
            f"next, decode with it: --config.space.decoder={folder}"
        )

    def _pairs(self, params: Params) -> tuple[np.ndarray, np.ndarray]:
        """Returns held-out images and reconstructions, uint8 [N, H, W, 3], on every host."""
        shards = self._sharding.mesh.size
        batch = whole_batch(min(fixed_batch(self.config.sample.batch), max(self._count, 1)), shards)
        found: list[list[np.ndarray]] = [[], []]
        batches = iterate_once(self._source, batch, rows=process_rows(self._sharding, batch))
        for step, rows in zip(range(-(-self._count // batch)), batches, strict=False):
            given = {"image": rows["image"], "index": rows["index"].astype(np.int32)}
            placed = host_to_global(given, self._sharding, batch)
            decoded = self._reconstruct(params, self._variables, placed["image"])
            numbers = step * batch + np.arange(batch)
            check_row_order(fetch(placed["index"]), numbers, "reconstructions")
            for kept, array in zip(found, (placed["image"], decoded), strict=True):
                kept.append(fetch(array))
        empty = np.zeros((0, *self._source.image_shape), np.uint8)
        inputs, outputs = (np.concatenate([empty, *arrays])[: self._count] for arrays in found)
        return inputs, outputs

    def _export(self, folder: Path, params: Params, step: int, *, replace: bool) -> None:
        """Writes the decoder; a folder is there whole or not at all.

        Args:
          folder: Folder to write.
          params: The decoder's parameters.
          step: Steps done.
          replace: Replaces the folder of a run that has gone back since; otherwise it stays.
        """
        if folder.exists() and not replace:
            return
        unfinished = folder.with_name(f".{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        record: dict[str, Any] = {
            "source": "python -m dsr_jax.train_decoder",
            "step": step,
            "ema": self.config.sample.ema,
            "trained_with": file_digests(self.config),
        }
        save_decoder(unfinished, self._sizes, params, record)
        if folder.exists():
            shutil.rmtree(folder)
        rename_synced(unfinished, folder)


def save_pairs(path: Path, inputs: np.ndarray, outputs: np.ndarray) -> None:
    """Writes images [N, H, W, C] row by row, each row above that of their reconstructions."""
    columns = min(COLUMNS, len(inputs))
    rows = []
    for first in range(0, len(inputs) - columns + 1, columns):
        rows += [inputs[first : first + columns], outputs[first : first + columns]]
    save_png_grid(path, np.concatenate(rows), columns=columns)
