"""The Inception Score against its definition, whatever the batches."""

import numpy as np
import pytest

from dsr_jax.core.errors import EvaluationError
from dsr_jax.evaluation.inception_score import InceptionScore, score_splits

LOGITS = np.random.RandomState(0).randn(23, 6) * 3


def by_definition(logits):
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(axis=0))), axis=1)))


@pytest.mark.parametrize("batch", [1, 4, 10, 23])
def test_chunks_in_file_order_with_a_short_last_one(batch):
    score = InceptionScore(6, split_size=10)
    for first in range(0, 23, batch):
        score.update(LOGITS[first : first + batch])
    want = [by_definition(LOGITS[i : i + 10]) for i in (0, 10, 20)]
    np.testing.assert_allclose(score.chunks(), want, rtol=1e-12)
    assert score.score() == pytest.approx(np.mean(want), rel=1e-12)


def test_a_pass_continues_where_it_stopped():
    whole, half = InceptionScore(6, 10), InceptionScore(6, 10)
    whole.update(LOGITS[:13])
    half.update(LOGITS[:13])
    other = InceptionScore(6, 10)
    other.restore(half.state())
    for score in (whole, other):
        score.update(LOGITS[13:])
    assert whole.score() == other.score()


def test_certain_and_useless_classifiers():
    certain = InceptionScore(4)
    certain.update(np.eye(4).repeat(5, axis=0) * 1e4)
    assert certain.score() == pytest.approx(4)
    useless = InceptionScore(4)
    useless.update(np.zeros((9, 4)))
    assert useless.score() == pytest.approx(1)


def test_splits_by_edges():
    want = [by_definition(LOGITS[:11]), by_definition(LOGITS[11:])]
    np.testing.assert_allclose(score_splits(LOGITS, [0, 11, 23]), want, rtol=1e-12)


def test_what_cannot_be_scored():
    score = InceptionScore(6)
    with pytest.raises(EvaluationError, match="at least one sample"):
        score.score()
    with pytest.raises(EvaluationError, match=r"shape \(2, 5\)"):
        score.update(np.zeros((2, 5)))
    with pytest.raises(EvaluationError, match="not finite"):
        score.update(np.full((1, 6), np.nan))
