"""Pass of metrics over a set of images, which continues an interrupted one.

Images are split over all devices of all hosts. Process 0 updates the metrics in the images' order,
so that neither hosts nor devices change the scores. Source: spec evaluation 9.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsr_jax.core.arrays import read_arrays
from dsr_jax.core.errors import EvaluationError
from dsr_jax.core.files import write_atomic
from dsr_jax.core.typing import Array
from dsr_jax.evaluation.features import Extractor
from dsr_jax.evaluation.image_sets import ImageSet
from dsr_jax.evaluation.metric import Metric, needs_of
from dsr_jax.parallel.processes import is_process_zero, log
from dsr_jax.parallel.shardings import check_row_order, fetch

SAVE_EVERY = 5000
"""Images between two savings of an unfinished pass."""

_PROGRESS = "progress.npz"


def update_metrics(
    images: ImageSet,
    extractor: Extractor,
    metrics: Sequence[Metric],
    *,
    folder: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    save_every: int = SAVE_EVERY,
    allow_constant: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> None:
    """Passes all images through the networks once and updates metrics with what they need.

    Args:
      images: Images to score.
      extractor: The networks.
      metrics: New ones, with different names; complete afterwards on process 0, empty on others.
      folder: For what a stopped pass continues from, removed by `forget`; None to keep nothing. All
        hosts must see it.
      identity: Settings that must be equal to continue a pass, besides the extractor's recipe.
      save_every: Images between two savings.
      allow_constant: Takes images of a single color, too.
      report: Called with images done and in all, on process 0.

    Raises:
      EvaluationError: If images are constant or too dark to be of 0 to 255, labels are missing,
        features are not finite, or the folder is of something else.
    """
    needs = needs_of(metrics)
    outputs = needs - {"labels"}
    total, batch = images.shape[0], extractor.batch
    if "labels" in needs and images.labels is None:
        asking = ", ".join(metric.name for metric in metrics if "labels" in metric.needs)
        raise EvaluationError(
            f"{asking} needs the class of every image, and the images have no labels",
            "add an integer array 'labels' [N] to the file",
        )
    recipe = {**extractor.recipe(outputs), **(identity or {})}
    names = sorted(metric.name for metric in metrics)
    progress = _Progress(folder, metrics, {**recipe, "metrics": names})
    start = agree(progress.restore() if is_process_zero() else 0)
    if 0 < start < total:
        log(f"continuing after {start} of {total} images")
    saved = start
    pending: tuple[int, dict[str, Array]] | None = None

    def finish(first: int, arrays: dict[str, Array]) -> None:
        nonlocal saved
        given = {name: x[: total - first] for name, x in fetch(arrays).items()}
        wanted = first + np.arange(min(batch, total - first))
        check_row_order(given.pop("index"), wanted, "features")
        _check_levels(first, given.pop("min"), given.pop("max"), allow_constant)
        done = min(first + batch, total)
        if not is_process_zero():
            return
        if images.labels is not None and "labels" in needs:
            given["labels"] = images.labels[first:done]
        progress.update(given)
        if done - saved >= save_every or done == total:
            progress.save(done)
            saved = done
        if report is not None:
            report(done, total)

    for number, local in enumerate(images.batches(batch, start, extractor.rows)):
        # The devices work on one batch while the host reads the next and adds up the last.
        first = start + number * batch
        current = extractor(fill_batch(local, len(extractor.rows)), outputs, first)
        if pending is not None:
            finish(*pending)
        pending = (first, current)
    if pending is not None:
        finish(*pending)


class _Progress:
    """Updates metrics, and stores the progress from which an interrupted pass continues.

    Args:
      folder: Folder for the saved state; None to save nothing.
      metrics: The metrics.
      settings: Settings that must be equal to continue a pass.
    """

    def __init__(
        self, folder: Path | None, metrics: Sequence[Metric], settings: Mapping[str, Any]
    ) -> None:
        self._folder, self._metrics = folder, metrics
        self._settings = json.loads(json.dumps(settings))
        # Metrics without a state receive again what they have received.
        replayed = [metric for metric in metrics if metric.state() is None]
        self._kept = sorted(needs_of(replayed))
        self._waiting: dict[str, list[np.ndarray]] = {name: [] for name in self._kept}
        self._parts: list[dict[str, Any]] = []

    def update(self, batch: Mapping[str, np.ndarray]) -> None:
        """Updates every metric with what it needs."""
        for metric in self._metrics:
            metric.update({name: batch[name] for name in metric.needs})
        if self._folder is not None:
            for name in self._kept:
                self._waiting[name].append(batch[name])

    def save(self, count: int) -> None:
        """Writes what is needed to continue after `count` images; kept rows are written once."""
        if self._folder is None:
            return
        if self._kept and self._waiting[self._kept[0]]:
            part: dict[str, Any] = {}
            for name in self._kept:
                rows, buffer = np.concatenate(self._waiting[name]), io.BytesIO()
                np.save(buffer, rows, allow_pickle=False)
                file, data = f"{name}-{count:08d}.npy", buffer.getvalue()
                write_atomic(self._folder / file, data)
                digest = hashlib.sha256(data).hexdigest()
                part[name] = {"file": file, "rows": len(rows), "sha256": digest}
                self._waiting[name].clear()
            self._parts.append(part)
        record = {"settings": self._settings, "count": count, "parts": self._parts}
        arrays: dict[str, Any] = {"record": json.dumps(record)}
        for metric in self._metrics:
            for key, value in (metric.state() or {}).items():
                arrays[f"{metric.name}/{key}"] = value
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_atomic(self._folder / _PROGRESS, buffer.getvalue())

    def restore(self) -> int:
        """Restores the metrics and returns the number of images that they have received.

        What is damaged is made again: files are verified before a metric is touched.

        Raises:
          EvaluationError: If the folder belongs to other images, weights or settings.
        """
        if self._folder is None or not (self._folder / _PROGRESS).is_file():
            return 0
        try:
            record, states, parts = self._read(self._folder)
        except (ValueError, LookupError, TypeError, AttributeError, OSError, EOFError) as error:
            log(f"{self._folder} is damaged ({error}); its images are taken again")
            forget(self._folder)
            return 0
        for metric in self._metrics:
            if metric.state() is None:
                for part in parts:
                    metric.update({name: part[name] for name in metric.needs})
            else:
                metric.restore(states[metric.name])
        self._parts = record["parts"]
        return int(record["count"])

    def _read(
        self, folder: Path
    ) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
        """Reads and verifies the record, the metrics' states and the kept rows."""
        states: dict[str, dict[str, np.ndarray]] = {metric.name: {} for metric in self._metrics}
        arrays = read_arrays(folder / _PROGRESS)
        record = json.loads(str(arrays["record"]))
        found = record["settings"]
        if found != self._settings:
            keys = [key for key in self._settings if found.get(key) != self._settings[key]]
            raise EvaluationError(
                f"{folder} holds an unfinished pass of other {', '.join(keys)}",
                "delete the folder, or name another --out",
            )
        for key, array in arrays.items():
            name, slash, rest = key.rpartition("/")
            if slash:
                states[name][rest] = array
        parts = []
        for part in record["parts"]:
            read = {}
            for name, details in part.items():
                data = (folder / details["file"]).read_bytes()
                if hashlib.sha256(data).hexdigest() != details["sha256"]:
                    raise ValueError(f"{details['file']} has another checksum than when written")
                read[name] = np.load(io.BytesIO(data), allow_pickle=False)
            parts.append(read)
        counts = [sum(part[name]["rows"] for part in record["parts"]) for name in self._kept]
        if any(count != record["count"] for count in counts):
            raise ValueError(f"rows of {counts} images are kept, not of {record['count']}")
        return record, states, parts


def forget(folder: Path) -> None:
    """Removes what a finished pass has left."""
    if is_process_zero():
        shutil.rmtree(folder, ignore_errors=True)


def agree(count: int) -> int:
    """Returns process 0's count, on every process."""
    if jax.process_count() == 1:
        return count
    return int(multihost_utils.broadcast_one_to_all(np.int64(count)))


def fill_batch(images: np.ndarray, size: int) -> np.ndarray:
    """Returns images [size, ...] with black ones added, whose results are to be cut off."""
    if len(images) == size:
        return images
    padding = np.zeros((size - len(images), *images.shape[1:]), images.dtype)
    return np.concatenate([images, padding])


def _check_levels(first: int, low: np.ndarray, high: np.ndarray, allow_constant: bool) -> None:
    """Checks the smallest and largest values of a batch's images.

    Raises:
      EvaluationError: Naming the first constant image, or that all are dark.
    """
    if first == 0 and len(high) > 1 and high.max() <= 1:
        raise EvaluationError(
            f"the first {len(high)} images have no value above {int(high.max())}, although uint8 "
            "images go from 0 to 255",
            "multiply images in [0, 1] by 255 before the cast to uint8",
        )
    constant = np.flatnonzero(low == high)
    if len(constant) and not allow_constant:
        raise EvaluationError(
            f"image {first + int(constant[0])} is constant: every value is "
            f"{int(high[constant[0]])} ({len(constant)} such images in its batch)",
            "a sampler that diverged leaves such images; sample them again, or score them as they "
            "are with --allow-constant",
        )
