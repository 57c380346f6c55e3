"""PSNR, SSIM and LPIPS of many pairs of images, over all hosts and devices."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsr_jax.core.arrays import read_arrays
from dsr_jax.core.errors import DamagedFileError, EvaluationError
from dsr_jax.core.files import open_atomic
from dsr_jax.core.typing import Array, Params
from dsr_jax.evaluation.image_sets import ImageSet
from dsr_jax.evaluation.passes import agree, fill_batch
from dsr_jax.evaluation.reconstruction import psnr, ssim
from dsr_jax.models.lpips import LPIPS
from dsr_jax.parallel.axes import make_rules
from dsr_jax.parallel.processes import is_process_zero, log
from dsr_jax.parallel.shardings import (
    batch_sharding,
    check_row_order,
    fetch,
    host_to_global,
    process_rows,
    replicated,
)
from dsr_jax.telemetry.progress import announce_first_call

_SAVE_EVERY = 5000


class PairScorer:
    """Compares images one by one with their reconstructions.

    Args:
      mesh: All devices; pairs are split over every axis.
      batch: Pairs at a time, a multiple of the number of devices.
      lpips: Perceptual distance, or None to do without.
      params: Parameters of the network.
    """

    def __init__(
        self, mesh: Mesh, batch: int, lpips: LPIPS | None = None, params: Params | None = None
    ) -> None:
        self._batch = -(-batch // mesh.size) * mesh.size
        self._sharding = batch_sharding(mesh, make_rules("replicated"))
        self._rows = process_rows(self._sharding, self._batch)
        self._names = ["psnr", "ssim"] + ["lpips"] * (lpips is not None)
        self._lpips = lpips
        self._params = jax.device_put(params, replicated(mesh))
        self._distance = announce_first_call(jax.jit(self._compare), "LPIPS")

    def score(
        self,
        images: ImageSet,
        outputs: ImageSet,
        folder: Path,
        identity: Mapping[str, Any],
        report: Callable[[int, int], None] | None = None,
    ) -> dict[str, float]:
        """Means over all pairs: "psnr" in dB, "ssim", and "lpips" where there is a network.

        On processes other than 0 the result is empty.

        Args:
          images: The images.
          outputs: Their reconstructions, in the same order.
          folder: For what a stopped pass continues from; all hosts must see it.
          identity: Settings that must be equal to continue a pass.
          report: Called with pairs done and in all, on process 0.

        Raises:
          EvaluationError: If shapes differ, or the folder is of something else.
        """
        if images.shape != outputs.shape:
            raise EvaluationError(
                f"images are {images.shape}, reconstructions {outputs.shape}",
                "reconstruct the same images, in their order and size",
            )
        path, marks = folder / "pairs.npz", json.dumps({**identity, "scores": self._names})
        values = _restore(path, marks) if is_process_zero() else []
        saved = done = agree(sum(map(len, values)))
        both = (each.batches(self._batch, done, self._rows) for each in (images, outputs))
        for ours, theirs in zip(*both, strict=True):
            rows = self._score_batch(done, ours, theirs)[: images.shape[0] - done]
            values.append(rows)
            done += len(rows)
            if report is not None and is_process_zero():
                report(done, images.shape[0])
            if is_process_zero() and done - saved >= _SAVE_EVERY:
                saved = done
                with open_atomic(path) as file:
                    np.savez(file, values=np.concatenate(values), identity=marks)
        if not is_process_zero():
            return {}
        means = np.concatenate(values).mean(axis=0)
        return {name: float(mean) for name, mean in zip(self._names, means, strict=True)}

    def _score_batch(self, first: int, images: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """Scores [B, 2 or 3] of the batch from pair `first` on, from this process's rows of it."""
        size = len(self._rows)
        scores = np.zeros((size, 2))
        if count := len(images):
            scores[:count] = np.stack([psnr(images, outputs), ssim(images, outputs)], axis=1)
        shown = (fill_batch(x, size) for x in (images, outputs))
        given: dict[str, Any] = dict(zip(("images", "outputs"), shown, strict=True))
        # Devices have no 64-bit floats; two of 32 bits hold a score well enough.
        high = scores.astype(np.float32)
        given |= {"high": high, "low": (scores - high).astype(np.float32)}
        given["index"] = (first + self._rows).astype(np.int32)
        arrays = host_to_global(given, self._sharding, self._batch)
        check_row_order(fetch(arrays["index"]), first + np.arange(self._batch), "scores of pairs")
        rows: np.ndarray = fetch(arrays["high"]).astype(np.float64) + fetch(arrays["low"])
        if self._lpips is None:
            return rows
        distances = fetch(self._distance(self._params, arrays["images"], arrays["outputs"]))
        return np.concatenate([rows, distances[:, None].astype(np.float64)], axis=1)

    def _compare(self, params: Params, images: Array, outputs: Array) -> Array:
        assert self._lpips is not None
        a, b = (x.astype(jnp.float32) / 127.5 - 1 for x in (images, outputs))
        with jax.default_matmul_precision("highest"):
            distances: Any = self._lpips.apply({"params": params}, a, b)
        return distances


def _restore(path: Path, marks: str) -> list[np.ndarray]:
    """Returns the scores of a stopped pass.

    Raises:
      EvaluationError: If they are of something else.
    """
    if not path.is_file():
        return []
    try:
        arrays = read_arrays(path)
        identity, values = str(arrays["identity"]), arrays["values"]
    except (DamagedFileError, KeyError, OSError) as error:
        log(f"{path} is damaged ({error}); its pairs are scored again")
        return []
    if identity != marks:
        raise EvaluationError(
            f"{path} was computed for other images or networks", "delete it, or name another --out"
        )
    return [values]
