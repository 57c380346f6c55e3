"""Gaussian moments of features and the Frechet distance between them, in float64 on the host.

Source: ADM evaluator (guided-diffusion evaluations/evaluator.py); spec evaluation 6.1 and 9.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from dsr_jax.core.errors import EvaluationError

BLOCK = 1024
"""Rows whose scatter is one matrix product."""


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] (divided by N - 1), float64, of `count` rows."""

    mean: np.ndarray
    cov: np.ndarray
    count: int


class Moments:
    """Moments of rows that arrive in batches, on one host or on several.

    Mean and centred scatter of blocks of rows are merged pairwise (Chan, Golub and LeVeque 1979),
    so that no large sums of squares cancel. Blocks are counted from the first row on, whatever the
    batches were: the same rows in the same order give the same bits, and in another order, or
    merged from several hosts, differ by float64 rounding.

    Args:
      dim: Width D of the rows.
    """

    def __init__(self, dim: int) -> None:
        self._count = 0
        self._mean = np.zeros(dim)
        self._scatter = np.zeros((dim, dim))
        self._waiting = np.zeros((0, dim))

    @property
    def count(self) -> int:
        """Rows so far."""
        return self._count + len(self._waiting)

    def update(self, features: np.ndarray) -> None:
        """Adds the rows of `features` [B, D], any float type.

        Raises:
          EvaluationError: If the width differs or a value is not finite.
        """
        features = np.asarray(features)
        if features.ndim != 2 or features.shape[1] != len(self._mean):
            raise EvaluationError(
                f"features have shape {features.shape}, expected [B, {len(self._mean)}]"
            )
        if not np.isfinite(features).all():
            bad = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
            raise EvaluationError(
                f"features of row {self.count + bad} are not finite",
                "look at that sample, and at the feature network's weights",
            )
        while len(features):
            free = BLOCK - len(self._waiting)
            rows = features[:free].astype(np.float64)
            self._waiting = np.concatenate([self._waiting, rows])
            features = features[free:]
            if len(self._waiting) == BLOCK:
                self._add_block()

    def _add_block(self) -> None:
        """Merges the waiting rows into the sums."""
        if rows := len(self._waiting):
            mean = self._waiting.mean(axis=0)
            centred = self._waiting - mean
            self._waiting = self._waiting[:0]
            self._add(rows, mean, centred.T @ centred)

    def merge(self, other: "Moments") -> None:
        """Adds the rows that `other` has seen, for example on another host."""
        if other._count:
            self._add(other._count, other._mean, other._scatter)
        self.update(other._waiting)

    def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self._count + count
        step = mean - self._mean
        self._mean = self._mean + step * (count / total)
        # In place: of 2048 features each copy of the matrix is 32 MiB.
        self._scatter += scatter
        self._scatter += np.outer(step * (self._count * count / total), step)
        self._count = total

    def state(self) -> dict[str, np.ndarray]:
        """Arrays from which `restore` goes on."""
        return {
            "count": np.asarray(self._count),
            "mean": self._mean,
            "scatter": self._scatter,
            "waiting": self._waiting,
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on from what `state` returned."""
        self._count, self._waiting = int(state["count"]), np.array(state["waiting"])
        self._mean, self._scatter = np.array(state["mean"]), np.array(state["scatter"])

    def gaussian(self) -> Gaussian:
        """Returns the moments of all rows so far.

        Raises:
          EvaluationError: If there are fewer than two rows.
        """
        if self.count < 2:
            raise EvaluationError(
                f"a covariance needs at least 2 rows, there are {self.count}", "score more samples"
            )
        whole = Moments(len(self._mean))
        whole.restore(self.state())
        whole._add_block()
        return Gaussian(whole._mean, whole._scatter / (whole._count - 1), whole._count)


def gaussian_moments(features: np.ndarray) -> Gaussian:
    """Returns the moments of `features` [N, D] in one go; errors as in `Moments`."""
    features = np.asarray(features)
    moments = Moments(features.shape[-1])
    moments.update(features)
    return moments.gaussian()


def _factor(cov: np.ndarray) -> np.ndarray:
    """A matrix F with F F^T = cov: Cholesky's, or that of the eigenvectors where rank is missing.

    Eigenvalues below zero are rounding and count as 0.
    """
    try:
        return np.linalg.cholesky(cov)
    except np.linalg.LinAlgError:
        values, vectors = scipy.linalg.eigh(cov, check_finite=False)
        return vectors * np.sqrt(np.clip(values, 0, None))


def _check(mean: np.ndarray, cov: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise EvaluationError(f"{name} moments have shapes {mean.shape} and {cov.shape}")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise EvaluationError(f"{name} moments are not finite")
    return mean, (cov + cov.T) / 2


def frechet_distance(
    mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray
) -> float:
    """Frechet distance |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)) of two Gaussians.

    The trace of the root is taken from the symmetric matrix F^T S1 F with S2 = F F^T, which has the
    eigenvalues of S1 S2 and stays real where covariances are rank-deficient; no offset is added to
    the diagonals. As in the official evaluators the result is not clipped: equal moments may give
    a value of about -1e-14.

    Args:
      mean1: Mean [D] of the samples' features.
      cov1: Their covariance [D, D].
      mean2: Mean of the reference's features.
      cov2: Their covariance.

    Raises:
      EvaluationError: If shapes differ or a value is not finite.
    """
    mean1, cov1 = _check(mean1, cov1, "sample")
    mean2, cov2 = _check(mean2, cov2, "reference")
    if mean1.shape != mean2.shape:
        raise EvaluationError(
            f"sample features have width {len(mean1)}, reference features {len(mean2)}",
            "compare features of the same network and layer",
        )
    factor = _factor(cov2)
    product = factor.T @ cov1 @ factor
    # SciPy's routine takes a quarter of the time of NumPy's for 2048 rows.
    eigenvalues = scipy.linalg.eigvalsh((product + product.T) / 2, check_finite=False)
    trace_root = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    gap = mean1 - mean2
    return float(gap @ gap + np.trace(cov1) + np.trace(cov2) - 2 * trace_root)
