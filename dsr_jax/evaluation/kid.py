"""Kernel Inception Distance: unbiased squared MMD over random subsets.

Source: torch-fidelity metric_kid.py; spec evaluation 6.4.
"""

from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from dsr_jax.core.errors import EvaluationError
from dsr_jax.evaluation.metric import PooledFeatureMetric

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020


class KIDResult(NamedTuple):
    """Mean and population standard deviation over the subsets."""

    mean: float
    std: float


def _kernel(x: np.ndarray, y: np.ndarray, sigma: float | None) -> np.ndarray:
    """Returns (x.y / D + 1)^3, or the Gaussian kernel of width `sigma`."""
    inner = x @ y.T
    if sigma is None:
        return (inner / x.shape[1] + 1) ** 3
    squares = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * inner
    return np.exp(-squares / (2 * sigma**2))


def squared_mmd(x: np.ndarray, y: np.ndarray, sigma: float | None = None) -> float:
    """Returns the unbiased squared maximum mean discrepancy of x [N, D] and y [M, D], in float64.

    Args:
      x: Features.
      y: Others.
      sigma: Width of a Gaussian kernel; None for the cubic polynomial.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    means = []
    for rows in (x, y):
        kernel = _kernel(rows, rows, sigma)
        means.append((kernel.sum() - np.trace(kernel)) / (len(rows) * (len(rows) - 1)))
    return float(sum(means) - 2 * _kernel(x, y, sigma).mean())


def kernel_inception_distance(
    samples: np.ndarray,
    reference: np.ndarray,
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    sigma: float | None = None,
    seed: int = SEED,
) -> KIDResult:
    """Returns KID of samples [N, D] against a reference [M, D].

    Args:
      samples: Features of the samples.
      reference: Features of the reference images.
      subsets: Number of pairs of random subsets.
      subset_size: Rows of each, chosen without replacement.
      sigma: Width of a Gaussian kernel; None for the usual cubic polynomial.
      seed: Seed of the random subsets; for each pair first the samples', then the reference's.

    Raises:
      EvaluationError: If widths differ, or a set is smaller than its subsets.
    """
    if samples.ndim != 2 or samples.shape[1:] != reference.shape[1:]:
        raise EvaluationError(
            f"features are {samples.shape} and {reference.shape}",
            "compare features of the same network and layer",
        )
    fewer = min(len(samples), len(reference))
    if not 2 <= subset_size <= fewer:
        raise EvaluationError(
            f"KID takes subsets of {subset_size} from {fewer} features",
            f"score more samples, or take subsets of 2 to {fewer}",
        )
    random = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x, y = (rows[random.choice(len(rows), subset_size, False)] for rows in (samples, reference))
        values.append(squared_mmd(x, y, sigma))
    return KIDResult(float(np.mean(values)), float(np.std(values)))


class KID(PooledFeatureMetric):
    """KID as torch-fidelity computes it; subsets are as large as both sets allow, up to 1000."""

    name: ClassVar[str] = "kid"
    min_images: ClassVar[int] = 2

    def compute(self, reference: Self | None) -> dict[str, float]:
        """Returns "kid" and "kid_std"; errors as in `kernel_inception_distance`."""
        assert reference is not None
        rows = self.features(), reference.features()
        found = kernel_inception_distance(*rows, subset_size=self._subset_size(reference))
        return {"kid": found.mean, "kid_std": found.std}

    def recipe(self, reference: Self | None) -> dict[str, Any]:
        """Returns the subsets' number, size and seed."""
        assert reference is not None
        size = self._subset_size(reference)
        return {"kid": {"subsets": SUBSETS, "subset_size": size, "seed": SEED}}

    def _subset_size(self, reference: Self) -> int:
        return min(SUBSET_SIZE, self.count, reference.count)
