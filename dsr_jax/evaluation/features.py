"""One pass of feature networks over a set of images: what each score needs, and no more.

Images are split over all devices of all hosts. Moments are summed in float64 by the primary
process in the images' order, so that neither hosts nor devices change the sums; a pass that was
stopped goes on from the last saved sums. Source: spec evaluation 9.
"""

import io
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dsr_jax.core.errors import EvaluationError
from dsr_jax.core.files import open_atomic, write_atomic
from dsr_jax.core.typing import Array, Params
from dsr_jax.evaluation.frechet import FeatureMoments, Gaussian
from dsr_jax.evaluation.image_sets import ImageSet
from dsr_jax.evaluation.inception_score import InceptionScore
from dsr_jax.evaluation.networks import FeatureNetwork
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

_NEEDS = {
    "fid": "moments",
    "sfid": "spatial",
    "is": "score",
    "pr": "rows",
    "kid": "rows",
    "fd_dinov2": "dinov2",
}
_OUTPUTS = {
    "moments": "pool",
    "rows": "pool",
    "spatial": "spatial",
    "score": "logits",
    "dinov2": "class_token",
}
METRICS = tuple(_NEEDS)
_PROGRESS = "progress.npz"

SAVE_EVERY = 5000
"""Images between two savings of an unfinished pass."""


def needs_of(metrics: Iterable[str]) -> frozenset[str]:
    """What has to be kept for these metrics: of "moments", "rows", "spatial", "score", "dinov2".

    Raises:
      EvaluationError: For an unknown metric.
    """
    if unknown := [name for name in metrics if name not in METRICS]:
        raise EvaluationError(f"unknown metrics {unknown}", f"choose from {', '.join(METRICS)}")
    return frozenset(_NEEDS[name] for name in metrics)


def outputs_of(metrics: Iterable[str]) -> frozenset[str]:
    """Names of the features that these metrics are computed from; errors as in `needs_of`."""
    return frozenset(_OUTPUTS[need] for need in needs_of(metrics))


class Extractor:
    """Frozen networks on all devices.

    Args:
      networks: The networks; no two have features of the same name.
      mesh: All devices; images are split over every axis.
      batch: Images at a time over all devices; rounded up to a multiple of their number.

    Attributes:
      batch: Images at a time.
      rows: Rows [n] of a batch that this process's devices hold.
      widths: Of every feature.
    """

    def __init__(self, networks: Sequence[FeatureNetwork], mesh: Mesh, batch: int = 64) -> None:
        self.batch = -(-batch // mesh.size) * mesh.size
        self._sharding = batch_sharding(mesh, make_rules("replicated"))
        self.rows = process_rows(self._sharding, self.batch)
        self._networks = networks
        self._params = [jax.device_put(each.params, replicated(mesh)) for each in networks]
        self._compiled: dict[frozenset[str], Any] = {}
        image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8)
        self.widths: dict[str, int] = {}
        for each in networks:
            shapes = jax.eval_shape(each.apply, each.params, image)
            self.widths |= {name: x.shape[1] for name, x in shapes.items()}

    @property
    def records(self) -> list[dict[str, Any]]:
        """What the networks' conversions wrote down."""
        return [dict(each.record) for each in self._networks]

    def recipe(self, outputs: frozenset[str]) -> dict[str, Any]:
        """What decides these features, besides the images."""
        used = (each.recipe for each in self._networks if each.outputs & outputs)
        return {key: value for recipe in used for key, value in recipe.items()}

    def __call__(
        self, images: np.ndarray, outputs: frozenset[str], first: int = 0
    ) -> dict[str, Array]:
        """Extracts features of a batch, of which each process gives the rows that it holds.

        Args:
          images: uint8 [n, H, W, C], this process's `rows` of the batch.
          outputs: Names in `widths`.
          first: Index of the batch's first image.

        Returns:
          The global arrays asked for, by image in order; "min" and "max", the extreme values of
          each image; and "index", each image's own index, which went along with it.
        """
        if outputs not in self._compiled:
            self._compiled[outputs] = jax.jit(lambda p, x: self._extract(p, x, outputs))
        local = {"images": images, "index": (first + self.rows).astype(np.int32)}
        given = host_to_global(local, self._sharding, self.batch)
        return {**self._compiled[outputs](self._params, given["images"]), "index": given["index"]}

    def _extract(
        self, params: Sequence[Params], images: Array, outputs: frozenset[str]
    ) -> dict[str, Array]:
        found = {"min": images.min(axis=(1, 2, 3)), "max": images.max(axis=(1, 2, 3))}
        for network, given in zip(self._networks, params, strict=True):
            if wanted := network.outputs & outputs:
                features = network.apply(given, images)
                found |= {name: features[name] for name in wanted}
        return found


class FeatureStatistics:
    """Sums and rows over the images seen so far.

    Args:
      needs: From `needs_of`.
      widths: Of every feature that these need.

    Attributes:
      count: Images seen.
      moments: Of pooled features, or None.
      spatial: Of spatial features, or None.
      score: Inception Score, or None.
      dinov2: Moments of DINOv2's class tokens, or None.
    """

    def __init__(self, needs: frozenset[str], widths: Mapping[str, int]) -> None:
        self.needs = needs
        self.outputs = frozenset(_OUTPUTS[need] for need in needs)
        self.count = 0
        self.moments = FeatureMoments(widths["pool"]) if "moments" in needs else None
        self.spatial = FeatureMoments(widths["spatial"]) if "spatial" in needs else None
        self.score = InceptionScore(widths["logits"]) if "score" in needs else None
        self.dinov2 = FeatureMoments(widths["class_token"]) if "dinov2" in needs else None
        self._rows: list[np.ndarray] = []
        self._width = widths.get("pool", 0)
        self._saved = 0

    @property
    def rows(self) -> np.ndarray:
        """Pooled features of all images [N, D], float32."""
        return np.concatenate([np.zeros((0, self._width), np.float32), *self._rows])

    def add(self, features: Mapping[str, np.ndarray]) -> None:
        """Adds the next images' features.

        Raises:
          EvaluationError: If one is not finite.
        """
        for sums, name in self._sums():
            sums.update(features[_OUTPUTS[name]])
        if "rows" in self.needs:
            self._rows.append(np.asarray(features["pool"], np.float32))
        self.count += len(next(iter(features.values())))

    def gaussian(self, metric: str) -> Gaussian:
        """Moments of "fid", "sfid" or "fd_dinov2", which must be among the metrics."""
        by_name = {"fid": self.moments, "sfid": self.spatial, "fd_dinov2": self.dinov2}
        sums = by_name[metric]
        assert sums is not None
        return sums.gaussian()

    def _sums(self) -> list[tuple[FeatureMoments | InceptionScore, str]]:
        named = (
            (self.moments, "moments"),
            (self.spatial, "spatial"),
            (self.score, "score"),
            (self.dinov2, "dinov2"),
        )
        return [(sums, name) for sums, name in named if sums is not None]

    def save(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Writes what is needed to go on; rows that are there already are not written again."""
        if "rows" in self.needs and self.count > self._saved:
            with open_atomic(folder / f"rows-{self._saved:08d}-{self.count:08d}.npy") as file:
                np.save(file, self.rows[self._saved :], allow_pickle=False)
            self._saved = self.count
        arrays: dict[str, Any] = {"identity": json.dumps(identity), "count": self.count}
        for sums, name in self._sums():
            arrays |= {f"{name}/{key}": value for key, value in sums.state().items()}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_atomic(folder / _PROGRESS, buffer.getvalue())

    def restore(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Goes on from what `save` wrote, if there is anything.

        Raises:
          EvaluationError: If the folder belongs to other images, weights or settings.
        """
        path = folder / _PROGRESS
        if not path.is_file():
            return
        with np.load(path, allow_pickle=False) as arrays:
            found, wanted = json.loads(str(arrays["identity"])), json.loads(json.dumps(identity))
            if found != wanted:
                differing = [key for key in wanted if found.get(key) != wanted[key]]
                raise EvaluationError(
                    f"{folder} holds an unfinished pass of other {', '.join(differing)}",
                    "delete the folder, or name another --out",
                )
            self.count = self._saved = int(arrays["count"])
            for sums, name in self._sums():
                keys = [key for key in arrays.files if key.startswith(f"{name}/")]
                sums.restore({key.removeprefix(f"{name}/"): arrays[key] for key in keys})
        if "rows" in self.needs:
            for part in sorted(folder.glob("rows-*.npy")):
                # Rows are written before the sums; a kill in between leaves some to be made again.
                if int(part.name.split("-")[1]) < self.count:
                    self._rows.append(np.load(part, allow_pickle=False))
                else:
                    part.unlink()


def extract_statistics(
    images: ImageSet,
    extractor: Extractor,
    metrics: Iterable[str],
    *,
    folder: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    save_every: int = SAVE_EVERY,
    allow_constant: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> FeatureStatistics:
    """Passes all images through the networks once.

    Args:
      images: What to score.
      extractor: The networks.
      metrics: Names in METRICS; only what they need is kept.
      folder: For what a stopped pass goes on from, removed by `forget`; None to keep nothing. All
        hosts must see it.
      identity: What must be equal for a pass to be continued, besides the extractor's recipe.
      save_every: Images between two savings.
      allow_constant: Takes images of a single colour, too.
      report: Takes images done and in all, on the primary process.

    Returns:
      The sums; complete on the primary process, empty on others.

    Raises:
      EvaluationError: If images are constant or too dark to be of 0 to 255, features are not
        finite, or the folder is of something else.
    """
    statistics = FeatureStatistics(needs_of(metrics), extractor.widths)
    total, batch = images.shape[0], extractor.batch
    recipe = extractor.recipe(statistics.outputs)
    settings = {**recipe, **(identity or {}), "needs": sorted(statistics.needs)}
    if folder is not None and is_process_zero():
        statistics.restore(folder, settings)
    start = agree(statistics.count)
    if 0 < start < total:
        log(f"continuing after {start} of {total} images")
    saved = start
    pending: tuple[int, dict[str, Array]] | None = None

    def finish(first: int, arrays: dict[str, Array]) -> None:
        nonlocal saved
        features = {name: x[: total - first] for name, x in fetch(arrays).items()}
        wanted = first + np.arange(min(batch, total - first))
        check_row_order(features.pop("index"), wanted, "features")
        _check_levels(first, features.pop("min"), features.pop("max"), allow_constant)
        done = min(first + batch, total)
        if not is_process_zero():
            return
        statistics.add(features)
        if folder is not None and (done - saved >= save_every or done == total):
            statistics.save(folder, settings)
            saved = done
        if report is not None:
            report(done, total)

    for number, local in enumerate(images.batches(batch, start, extractor.rows)):
        # The devices work on one batch while the host reads the next and adds up the last.
        first = start + number * batch
        current = extractor(_filled(local, len(extractor.rows)), statistics.outputs, first)
        if pending is not None:
            finish(*pending)
        pending = (first, current)
    if pending is not None:
        finish(*pending)
    return statistics


def forget(folder: Path) -> None:
    """Removes what a finished pass has left."""
    if is_process_zero():
        shutil.rmtree(folder, ignore_errors=True)


def agree(count: int) -> int:
    """The primary process's count, on every process."""
    if jax.process_count() == 1:
        return count
    return int(multihost_utils.broadcast_one_to_all(np.int64(count)))


def _filled(images: np.ndarray, size: int) -> np.ndarray:
    """Adds black images up to `size`; they are cut off again behind the network."""
    if len(images) == size:
        return images
    padding = np.zeros((size - len(images), *images.shape[1:]), images.dtype)
    return np.concatenate([images, padding])


def _check_levels(first: int, low: np.ndarray, high: np.ndarray, allow_constant: bool) -> None:
    """Checks the smallest and largest values of a batch's images.

    Raises:
      EvaluationError: Naming the first image that cannot be meant.
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
            "a sampler that diverged leaves such images; draw them again, or score them as they "
            "are with --allow-constant",
        )
