"""Moments of rows: NumPy's values, the same bits for any batches and restarts, no cancellation."""

from fractions import Fraction

import numpy as np
import pytest

from dsr_jax.core.moments import COVARIANCE_BLOCK, VARIANCE_BLOCK, Moments


@pytest.mark.parametrize("covariance", [True, False])
def test_they_equal_numpys(covariance: bool) -> None:
    rows = np.random.RandomState(0).randn(COVARIANCE_BLOCK * 2 + 57, 6).astype(np.float32) + 30
    moments = Moments((6,), covariance=covariance)
    moments.update(rows)
    mean, scatter = moments.mean_and_scatter()
    wide = rows.astype(np.float64)
    want = np.cov(wide, rowvar=False, bias=True) if covariance else wide.var(axis=0)
    np.testing.assert_allclose(mean, wide.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(scatter / moments.count, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("covariance", [True, False])
def test_batches_and_restarts_give_the_same_bits(covariance: bool) -> None:
    rows = np.random.RandomState(7).randn(2500, 4).astype(np.float32)
    whole, pieces = (Moments((4,), covariance=covariance) for _ in range(2))
    whole.update(rows)
    for piece in np.array_split(rows, 37):
        pieces.update(piece)
        again = Moments((4,), covariance=covariance)
        again.restore(pieces.state())
        pieces = again
    for found, want in zip(pieces.mean_and_scatter(), whole.mean_and_scatter(), strict=True):
        np.testing.assert_array_equal(found, want)


def test_order_changes_rounding_alone() -> None:
    rows = np.random.RandomState(0).randn(3001, 8) + 1e4
    found = []
    for order in (np.arange(3001), np.random.RandomState(1).permutation(3001)):
        moments = Moments((8,), covariance=True)
        moments.update(rows[order])
        found.append(moments.mean_and_scatter())
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-13)
    assert np.abs(found[1][1] - found[0][1]).max() <= 1e-10 * np.abs(found[0][1]).max()


def test_a_large_mean_does_not_swallow_a_small_variance() -> None:
    """Against exact fractions."""
    rows = 5000 + 1e-3 * np.random.RandomState(0).randn(VARIANCE_BLOCK * 5 + 3, 1)
    moments = Moments((1,), covariance=False)
    moments.update(rows)
    column = [Fraction(float(x)) for x in rows[:, 0]]
    mean = sum(column, Fraction(0)) / len(column)
    want = sum(((x - mean) ** 2 for x in column), Fraction(0))
    assert moments.mean_and_scatter()[1][0] == pytest.approx(float(want), rel=1e-8)


def test_rows_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 4\) for moments of \(2, 3\)"):
        Moments((2, 3), covariance=False).update(np.zeros((5, 2, 4)))
