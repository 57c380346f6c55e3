"""Reference files: statistics, images or both, as the ADM evaluator has them.

Keys are `mu`, `sigma` (pooled features), `mu_s`, `sigma_s` (spatial ones), `arr_0` (images). Files
of tools/make_reference.py add `features` (pooled features of the images), `num_images`, `recipe`
and, where asked for, `mu_dinov2`, `sigma_dinov2`. Source: spec evaluation 2.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dsr_jax.core.errors import EvaluationError
from dsr_jax.core.files import file_digest
from dsr_jax.evaluation.frechet import Gaussian
from dsr_jax.evaluation.image_sets import ImageFiles, ImageSet
from dsr_jax.evaluation.samples import open_samples, read_member, read_names

MOMENTS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "fid": ("mu", "sigma"),
        "sfid": ("mu_s", "sigma_s"),
        "fd_dinov2": ("mu_dinov2", "sigma_dinov2"),
    }
)
"""Keys of mean and covariance by metric."""

_OF_IMAGES = {*MOMENTS, "pr", "kid"}


@dataclass(frozen=True)
class Reference:
    """What a reference offers.

    Attributes:
      path: File or folder.
      statistics: Moments by "fid", "sfid" and "fd_dinov2", where the file has them.
      images: Its images, or None.
      features: Pooled features of images [M, D], float32, or None.
      recipe: What tools/make_reference.py wrote down, or None.
    """

    path: Path
    statistics: dict[str, Gaussian]
    images: ImageSet | None
    features: np.ndarray | None
    recipe: dict[str, Any] | None

    def digest(self) -> str:
        """SHA-256 of the file, or of a folder's images."""
        if isinstance(self.images, ImageFiles):
            return self.images.digest()
        return file_digest(self.path)

    def missing(self, metric: str) -> str:
        """Why a metric cannot be computed against this reference; "" where it can."""
        if metric == "is" or metric in self.statistics or self.images is not None:
            return ""
        if metric in MOMENTS:
            return f"{self.path} has neither {' and '.join(MOMENTS[metric])} nor images"
        return "" if self.features is not None else f"{self.path} has no images"

    def passes(self, metrics: list[str]) -> list[str]:
        """The metrics for which the reference's images must go through the network.

        Moments in the file take precedence over those of its images: ADM's files hold moments of
        the whole training set, but only 10,000 of its images.
        """
        return [
            name
            for name in metrics
            if name in _OF_IMAGES
            and name not in self.statistics
            and not (name in ("pr", "kid") and self.features is not None)
        ]


def open_reference(path: str | os.PathLike[str]) -> Reference:
    """Opens a reference: an `.npz`, or a folder of images.

    Raises:
      EvaluationError: If it is missing, damaged, or holds nothing to compare with.
    """
    path = Path(path)
    if path.is_dir():
        return Reference(path, {}, ImageFiles(path), None, None)
    if path.suffix in (".pkl", ".pickle", ".pt"):
        raise EvaluationError(
            f"reference {path} is a pickle, which could run code when read; refused",
            "save its arrays with numpy.savez(file, mu=..., sigma=...)",
        )
    names = read_names(path, "reference")
    images = open_samples(path) if "arr_0" in names else None
    statistics = {}
    for metric, (mean, cov) in MOMENTS.items():
        if mean in names or cov in names:
            statistics[metric] = _read_gaussian(path, names, mean, cov)
    if not statistics and images is None:
        raise EvaluationError(
            f"reference {path} has no statistics and no images, its keys are {sorted(names)}",
            "give an ADM reference, or make one with tools/make_reference.py",
        )
    features = _read_floats(path, "features", 2) if "features" in names else None
    recipe = json.loads(str(read_member(path, "recipe"))) if "recipe" in names else None
    return Reference(path, statistics, images, features, recipe)


def _read_gaussian(path: Path, names: list[str], mean: str, cov: str) -> Gaussian:
    if absent := [name for name in (mean, cov) if name not in names]:
        raise EvaluationError(
            f"reference {path} has {mean} or {cov}, but no {absent[0]}", "copy or make it again"
        )
    values, matrix = _read_floats(path, mean, 1), _read_floats(path, cov, 2)
    if matrix.shape != (len(values), len(values)):
        raise EvaluationError(
            f"{mean} and {cov} of {path} have shapes {values.shape} and {matrix.shape}",
            "a mean [D] needs a covariance [D, D]",
        )
    count = int(read_member(path, "num_images")) if "num_images" in names else 0
    return Gaussian(values.astype(np.float64), matrix.astype(np.float64), count)


def _read_floats(path: Path, key: str, rank: int) -> np.ndarray:
    array = read_member(path, key)
    if array.dtype.kind != "f" or array.ndim != rank:
        raise EvaluationError(
            f"{key} of {path} is {array.dtype}{array.shape}, expected floats of {rank} dimensions",
            "save plain arrays",
        )
    if not np.isfinite(array).all():
        raise EvaluationError(f"{key} of {path} is not finite", "make or copy it again")
    return array
