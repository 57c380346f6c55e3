"""Precision and recall against plain float64 distances."""

import numpy as np
import pytest

from dsr_jax.core.errors import EvaluationError
from dsr_jax.evaluation import precision_recall as module
from dsr_jax.evaluation.precision_recall import precision_recall


def by_definition(samples, reference):
    def distances(a, b):
        return np.square(a[:, None].astype(np.float64) - b).sum(axis=-1)

    radii = np.sort(distances(samples, samples), axis=1)[:, 3]
    reference_radii = np.sort(distances(reference, reference), axis=1)[:, 3]
    cross = distances(samples, reference)
    return (cross <= reference_radii).any(axis=1), (cross <= radii[:, None]).any(axis=0)


@pytest.mark.parametrize("rows", [7, 64, 1024])
def test_membership_in_blocks(monkeypatch, rows):
    monkeypatch.setattr(module, "ROWS", rows)
    random = np.random.RandomState(1)
    # Far from the origin, where squared norms would eat the digits of float32.
    samples = (random.randn(90, 5) * 1.5 + 300).astype(np.float32)
    reference = (random.randn(60, 5) + 300.7).astype(np.float32)
    found = precision_recall(samples, reference)
    inside, covered = by_definition(samples, reference)
    np.testing.assert_array_equal(found.sample_inside, inside)
    np.testing.assert_array_equal(found.reference_inside, covered)
    assert 0 < found.precision < 1 and 0 < found.recall < 1
    assert found.precision == inside.mean() and found.recall == covered.mean()


def test_equal_and_disjoint_sets():
    random = np.random.RandomState(2)
    points = random.randn(40, 3).astype(np.float32)
    same = precision_recall(points, points)
    assert (same.precision, same.recall) == (1, 1)
    apart = precision_recall(points, points + 1000)
    assert (apart.precision, apart.recall) == (0, 0)


def test_a_dropped_mode_lowers_recall_alone():
    random = np.random.RandomState(3)
    one, other = random.randn(2, 200, 4).astype(np.float32) + np.array([[[0]], [[50]]])
    found = precision_recall(random.randn(200, 4).astype(np.float32), np.concatenate([one, other]))
    assert found.precision > 0.8 and 0.3 < found.recall <= 0.5


def test_what_cannot_be_compared():
    with pytest.raises(EvaluationError, match="no third neighbor"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
    with pytest.raises(EvaluationError, match="same network"):
        precision_recall(np.zeros((9, 2)), np.zeros((9, 3)))
