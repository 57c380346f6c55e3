"""Reference files: statistics, images or both, as the ADM evaluator has them.

Keys are `mu`, `sigma` (pooled features), `mu_s`, `sigma_s` (spatial ones), `arr_0` (images). Files
of tools/make_reference.py add `features` (pooled features of the images), `num_images`, `recipe`
and, where asked for, `mu_dinov2`, `sigma_dinov2`. Source: spec evaluation 2.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsr_jax.core.errors import EvaluationError
from dsr_jax.core.files import file_digest
from dsr_jax.evaluation.image_sets import ImageFiles, ImageSet
from dsr_jax.evaluation.samples import open_samples, read_member, read_names

_AGAIN = "make the reference again with tools/make_reference.py, or copy it again"


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] (divided by N - 1), float64, of `count` rows."""

    mean: np.ndarray
    cov: np.ndarray
    count: int


@dataclass(frozen=True)
class Reference:
    """Contents of a reference file.

    Attributes:
      path: File or folder.
      images: Its images, or None.
      statistics: Moments by their keys in the file: {("mu", "sigma"): ...}.
      features: Pooled features of images [M, D], float32, or None.
      recipe: What tools/make_reference.py recorded, or None.
    """

    path: Path
    images: ImageSet | None
    statistics: dict[tuple[str, str], Gaussian]
    features: np.ndarray | None = None
    recipe: dict[str, Any] | None = None

    def digest(self) -> str:
        """Returns the SHA-256 of the file, or of a folder's images."""
        if isinstance(self.images, ImageFiles):
            return self.images.digest()
        return file_digest(self.path)

    def gaussian(self, keys: tuple[str, str]) -> Gaussian | None:
        """Returns the moments that the file has under these keys of mean and covariance."""
        return self.statistics.get(keys)


def open_reference(path: str | os.PathLike[str]) -> Reference:
    """Opens a reference: an `.npz`, or a folder of images.

    Raises:
      EvaluationError: If it is missing, damaged, or holds nothing to compare with.
    """
    path = Path(path)
    if path.is_dir():
        return Reference(path, ImageFiles(path), {})
    if path.suffix in (".pkl", ".pickle", ".pt"):
        raise EvaluationError(
            f"reference {path} is a pickle, which could run code when read; refused",
            "save its arrays with numpy.savez(file, mu=..., sigma=...)",
        )
    names = read_names(path, "reference")
    images = open_samples(path) if "arr_0" in names else None
    statistics = _read_statistics(path, names)
    if images is None and not statistics:
        raise EvaluationError(
            f"reference {path} has no statistics and no images, its keys are {sorted(names)}",
            "give an ADM reference, or make one with tools/make_reference.py",
        )
    features = _read_floats(path, "features", 2) if "features" in names else None
    recipe = _read_recipe(path) if "recipe" in names else None
    return Reference(path, images, statistics, features, recipe)


def _read_recipe(path: Path) -> dict[str, Any]:
    """Reads the recipe that tools/make_reference.py recorded."""
    try:
        recipe = json.loads(str(read_member(path, "recipe")))
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"recipe of {path} is no JSON: {error}", _AGAIN) from error
    if not isinstance(recipe, dict):
        raise EvaluationError(f"recipe of {path} is no object of JSON", _AGAIN)
    return recipe


def _read_count(path: Path) -> int:
    """Reads the number of images behind the moments."""
    count = read_member(path, "num_images")
    if count.shape or not np.issubdtype(count.dtype, np.integer) or count < 0:
        raise EvaluationError(
            f"num_images of {path} is {count.dtype}{count.shape}, expected one whole number", _AGAIN
        )
    return int(count)


def _read_statistics(path: Path, names: list[str]) -> dict[tuple[str, str], Gaussian]:
    """Reads every pair of `mu*` and `sigma*`."""
    found = {}
    tails = {
        name.removeprefix(start): None
        for name in names
        for start in ("mu", "sigma")
        if name.startswith(start)
    }
    for tail in tails:
        mean, cov = f"mu{tail}", f"sigma{tail}"
        if absent := [name for name in (mean, cov) if name not in names]:
            raise EvaluationError(
                f"reference {path} has {mean} or {cov}, but no {absent[0]}", _AGAIN
            )
        found[mean, cov] = _read_gaussian(path, names, mean, cov)
    return found


def _read_gaussian(path: Path, names: list[str], mean: str, cov: str) -> Gaussian:
    values, matrix = _read_floats(path, mean, 1), _read_floats(path, cov, 2)
    if matrix.shape != (len(values), len(values)):
        raise EvaluationError(
            f"{mean} and {cov} of {path} have shapes {values.shape} and {matrix.shape}",
            "a mean [D] needs a covariance [D, D]",
        )
    scale = np.abs(matrix).max(initial=0)
    if (
        np.diag(matrix).min(initial=0) < 0
        or np.abs(matrix - matrix.T).max(initial=0) > 1e-3 * scale
    ):
        raise EvaluationError(
            f"{cov} of {path} is no covariance: it is not symmetric or has a negative variance",
            _AGAIN,
        )
    count = _read_count(path) if "num_images" in names else 0
    return Gaussian(values.astype(np.float64), matrix.astype(np.float64), count)


def _read_floats(path: Path, key: str, rank: int) -> np.ndarray:
    array = read_member(path, key)
    if array.dtype.kind != "f" or array.ndim != rank:
        raise EvaluationError(
            f"{key} of {path} is {array.dtype}{array.shape}, expected floats of {rank} dimensions",
            "save plain arrays",
        )
    if not np.isfinite(array).all():
        raise EvaluationError(f"{key} of {path} is not finite", _AGAIN)
    return array
