"""Moments independent of order, and the Frechet distance against closed forms and an SVD."""

import numpy as np
import pytest

from dsr_jax.core.errors import EvaluationError
from dsr_jax.evaluation.frechet import FeatureMoments, frechet_distance, gaussian_moments


def features(num, dim, seed, rank=None, offset=0.0):
    """Correlated rows, of less than full rank if asked."""
    rng = np.random.RandomState(seed)
    rows = rng.randn(num, rank or dim) @ rng.randn(rank or dim, dim)
    return (rows + offset).astype(np.float32)


def distance(x, y):
    first, second = gaussian_moments(x), gaussian_moments(y)
    return frechet_distance(first.mean, first.cov, second.mean, second.cov)


def distance_by_svd(x, y):
    """The exact trace of the root for any rank: the nuclear norm of Xc Yc^T."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    xc = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    yc = (y - y.mean(0)) / np.sqrt(len(y) - 1)
    gap = x.mean(0) - y.mean(0)
    root = np.linalg.svd(xc @ yc.T, compute_uv=False).sum()
    return gap @ gap + (xc**2).sum() + (yc**2).sum() - 2 * root


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (features(200, 16, 0), features(150, 16, 1)),
        (features(10, 32, 2), features(12, 32, 3)),
        (features(200, 24, 4, rank=5), features(200, 24, 5, rank=9, offset=1.0)),
        (features(60, 24, 6, rank=1), features(60, 24, 7)),
        (features(300, 12, 8) * np.logspace(-4, 2, 12), features(300, 12, 9)),
    ],
    ids=["full_rank", "fewer_rows_than_columns", "rank_deficient", "rank_one", "ill_conditioned"],
)
def test_distance_equals_the_svd_route(x, y):
    traces = np.trace(gaussian_moments(x).cov) + np.trace(gaussian_moments(y).cov)
    want = distance_by_svd(x, y)
    assert want > 0.01
    assert abs(distance(x, y) - want) < 5e-7 * traces
    assert abs(distance(y, x) - want) < 5e-7 * traces


def test_distance_of_known_gaussians():
    """Commuting covariances: sum of (sqrt(a) - sqrt(b))^2 besides the means."""
    mean, variance = np.array([1.0, -2.0, 0.5]), np.array([4.0, 1.0, 0.25])
    got = frechet_distance(mean, np.diag(variance), np.zeros(3), np.diag(np.array([1.0, 9.0, 0.0])))
    assert got == pytest.approx((mean**2).sum() + 1 + 4 + 0.25, abs=1e-12)


def test_distance_to_itself_and_to_a_shifted_copy():
    x = features(100, 20, 0).astype(np.float64)
    traces = np.trace(gaussian_moments(x).cov)
    assert abs(distance(x, x)) < 1e-9 * traces
    assert distance(x, x + 0.25) == pytest.approx(20 * 0.25**2, abs=1e-9 * traces)


def test_moments_equal_numpys():
    x = features(57, 6, 0, offset=30.0)
    got = gaussian_moments(x)
    assert got.count == 57
    np.testing.assert_allclose(got.mean, x.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(got.cov, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)


def test_bad_features_are_named():
    moments = FeatureMoments(3)
    moments.update(np.zeros((5, 3)))
    with pytest.raises(EvaluationError, match=r"\(5, 4\), expected \[B, 3\]"):
        moments.update(np.zeros((5, 4)))
    rows = np.zeros((4, 3))
    rows[2, 1] = np.nan
    with pytest.raises(EvaluationError, match="row 7 are not finite"):
        moments.update(rows)
    with pytest.raises(EvaluationError, match="at least 2 rows, there are 1"):
        gaussian_moments(np.zeros((1, 3)))


def test_bad_moments_are_named():
    mean, cov = np.zeros(3), np.eye(3)
    with pytest.raises(EvaluationError, match="width 3, reference features 2"):
        frechet_distance(mean, cov, np.zeros(2), np.eye(2))
    with pytest.raises(EvaluationError, match="reference moments have shapes"):
        frechet_distance(mean, cov, mean, np.eye(4))
    with pytest.raises(EvaluationError, match="sample moments are not finite"):
        frechet_distance(mean, np.full((3, 3), np.inf), mean, cov)
