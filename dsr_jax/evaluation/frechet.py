"""Gaussian moments of features and the Frechet distance between them, in float64 on the host.

Source: ADM evaluator (guided-diffusion evaluations/evaluator.py); spec evaluation 6.1 and 9.
"""

from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np
import scipy.linalg

from dsr_jax.core.errors import EvaluationError
from dsr_jax.core.moments import Moments
from dsr_jax.evaluation.image_sets import ImageSet
from dsr_jax.evaluation.metric import Metric
from dsr_jax.evaluation.reference import Gaussian, Reference


class FeatureMoments(Moments):
    """Mean and covariance of features; see `core.moments.Moments`.

    Args:
      dim: Width D of the features.
    """

    def __init__(self, dim: int) -> None:
        super().__init__((dim,), covariance=True)

    def update(self, rows: np.ndarray) -> None:
        """Adds features [B, D] of any float type.

        Raises:
          EvaluationError: If the width differs or a value is not finite.
        """
        rows = np.asarray(rows)
        if rows.ndim != 2 or rows.shape[1:] != self.shape:
            raise EvaluationError(
                f"features have shape {rows.shape}, expected [B, {self.shape[0]}]"
            )
        if not np.isfinite(rows).all():
            bad = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
            raise EvaluationError(
                f"features of row {self.count + bad} are not finite",
                "check that sample and the feature network's weights",
            )
        super().update(rows)

    def gaussian(self) -> Gaussian:
        """Returns the moments of all rows so far.

        Raises:
          EvaluationError: If there are fewer than two rows.
        """
        if self.count < 2:
            raise EvaluationError(
                f"a covariance needs at least 2 rows, there are {self.count}", "score more samples"
            )
        mean, scatter = self.mean_and_scatter()
        return Gaussian(mean, scatter / (self.count - 1), self.count)


def gaussian_moments(features: np.ndarray) -> Gaussian:
    """Returns the moments of `features` [N, D] in one go; errors as in `FeatureMoments`."""
    features = np.asarray(features)
    moments = FeatureMoments(features.shape[-1])
    moments.update(features)
    return moments.gaussian()


def _factor(cov: np.ndarray) -> np.ndarray:
    """Returns F with F F^T = cov, by Cholesky, or by eigenvectors if cov is rank deficient.

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
    """Returns the Frechet distance of two Gaussians.

    It is |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)).

    The trace of the root is taken from the symmetric matrix F^T S1 F with S2 = F F^T, which has the
    eigenvalues of S1 S2 and stays real where covariances are rank-deficient; no offset is added to
    the diagonals. As in the official evaluators the result is not clipped: equal moments may give
    a value of about -1e-14.

    Args:
      mean1: [D] mean of the samples' features.
      cov1: [D, D] covariance of the samples' features.
      mean2: [D] mean of the reference's features.
      cov2: [D, D] covariance of the reference's features.

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


class FrechetMetric(Metric):
    """Frechet distance between the features of samples and of a reference.

    Attributes:
      feature: The features it compares.
      keys: Names of mean and covariance in a reference file.
    """

    feature: ClassVar[str]
    keys: ClassVar[tuple[str, str]]
    min_images: ClassVar[int] = 2

    def __init__(self) -> None:
        self._moments: FeatureMoments | None = None
        self._given: Gaussian | None = None

    def update(self, batch: Mapping[str, np.ndarray]) -> None:
        """Adds features; errors as in `FeatureMoments.update`."""
        if self._moments is None:
            self._moments = FeatureMoments(batch[self.feature].shape[-1])
        self._moments.update(batch[self.feature])

    def gaussian(self) -> Gaussian:
        """Returns the moments of all images; errors as in `FeatureMoments.gaussian`."""
        return self._given or (self._moments or FeatureMoments(0)).gaussian()

    def compute(self, reference: Self | None) -> dict[str, float]:
        """Returns the distance under the metric's name; errors as in `frechet_distance`."""
        assert reference is not None
        x, y = self.gaussian(), reference.gaussian()
        return {self.name: frechet_distance(x.mean, x.cov, y.mean, y.cov)}

    def warnings(self, images: ImageSet) -> list[str]:
        """Points out samples that are fewer than the papers'."""
        count, dim = images.shape[0], len(self.gaussian().mean)
        # As many points as dimensions span a hyperplane.
        if count <= dim:
            return [
                f"{self.name} of {count} samples for {dim} features: covariances lack rank, and "
                "the distance is far too large; compare it only with that of as many samples"
            ]
        if count < 50_000:
            return [
                f"{count} samples: papers use 50,000, and FID grows as samples get fewer (by 2 to "
                "3 at 10,000)"
            ]
        return []

    @classmethod
    def from_reference(cls, reference: Reference) -> Self | None:
        """Takes moments from the file; they precede those of its images.

        ADM's files hold moments of the whole training set, but only 10,000 of its images.
        """
        if (given := reference.gaussian(cls.keys)) is None:
            return None
        metric = cls()
        metric._given = given
        return metric

    @classmethod
    def reference_widths(cls, reference: Reference) -> dict[str, int]:
        """Returns the width of the file's mean."""
        given = reference.gaussian(cls.keys)
        return {} if given is None else {cls.feature: len(given.mean)}

    @classmethod
    def missing(cls, reference: Reference) -> str:
        """Names the keys that the file lacks."""
        problem = super().missing(reference)
        names = " and ".join(cls.keys)
        return f"{reference.path} has neither {names} nor images" if problem else ""

    def state(self) -> dict[str, np.ndarray]:
        """Returns the sums."""
        return {} if self._moments is None else self._moments.state()

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continues from the sums."""
        if state:
            self._moments = FeatureMoments(len(state["mean"]))
            self._moments.restore(state)


class FID(FrechetMetric):
    """Frechet Inception Distance, of pooled features."""

    name: ClassVar[str] = "fid"
    feature: ClassVar[str] = "pool"
    needs: ClassVar[frozenset[str]] = frozenset((feature,))
    keys: ClassVar[tuple[str, str]] = ("mu", "sigma")


class SFID(FrechetMetric):
    """Frechet Inception Distance of spatial features."""

    name: ClassVar[str] = "sfid"
    feature: ClassVar[str] = "spatial"
    needs: ClassVar[frozenset[str]] = frozenset((feature,))
    keys: ClassVar[tuple[str, str]] = ("mu_s", "sigma_s")


class FDDINOv2(FrechetMetric):
    """Frechet distance of DINOv2's class tokens."""

    name: ClassVar[str] = "fd_dinov2"
    feature: ClassVar[str] = "class_token"
    needs: ClassVar[frozenset[str]] = frozenset((feature,))
    keys: ClassVar[tuple[str, str]] = ("mu_dinov2", "sigma_dinov2")
