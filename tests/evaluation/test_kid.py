"""KID of sets whose distance is known."""

import numpy as np
import pytest

from dsr_jax.core.errors import EvaluationError
from dsr_jax.evaluation.kid import kernel_inception_distance, squared_mmd

X, Y = np.random.RandomState(0).randn(2, 40, 6).astype(np.float32)


@pytest.mark.parametrize("sigma", [None, 2.0])
def test_unbiased_distance_by_its_double_sum(sigma):
    def kernel(a, b):
        if sigma is None:
            return (a @ b / len(a) + 1) ** 3
        return np.exp(-np.square(a - b).sum() / (2 * sigma**2))

    x, y = X[:7].astype(np.float64), Y[:5].astype(np.float64)
    within = [
        np.mean([kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j])
        for s in (x, y)
    ]
    across = np.mean([kernel(a, b) for a in x for b in y])
    assert squared_mmd(x, y, sigma) == pytest.approx(sum(within) - 2 * across, rel=1e-10)


def test_equal_distributions_are_near_zero_and_others_are_not():
    near = kernel_inception_distance(X, Y, subsets=10, subset_size=30)
    far = kernel_inception_distance(X, Y + 1, subsets=10, subset_size=30)
    assert 5 * abs(near.mean) < far.mean and far.std > 0
    assert kernel_inception_distance(X, Y, subsets=10, subset_size=30) == near


def test_subsets_larger_than_the_set_are_refused():
    with pytest.raises(EvaluationError, match="subsets of 1000 from 40"):
        kernel_inception_distance(X, Y)
    with pytest.raises(EvaluationError, match="same network"):
        kernel_inception_distance(X, Y[:, :3])
