"""Scores of hidden units against a plain loop over images, blocks and tokens."""

import numpy as np
import pytest

from dsr_jax.registers.scoring import (
    Criterion,
    ScoreTable,
    Sparsity,
    outlier_mask,
    rank_neurons,
    score_images,
    token_norms,
)

DEPTH, BATCH, TOKENS, WIDTH, UNITS = 3, 4, 7, 5, 6


def _data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    activations = rng.normal(size=(DEPTH, BATCH, TOKENS, UNITS)).astype(np.float32)
    outputs = rng.normal(size=(BATCH, TOKENS, WIDTH)).astype(np.float32)
    outputs[:3, 2] *= 30
    outputs[1, 5] *= 90
    return activations, outputs


def _loop(activations: np.ndarray, outputs: np.ndarray, criterion: Criterion) -> np.ndarray:
    """The definition, one image after the other; rows of NaN for images without outliers."""
    scores = np.full((BATCH, DEPTH, UNITS), np.nan)
    for image in range(BATCH):
        rows, acts = list(outputs[image]), list(activations[:, image].swapaxes(0, 1))
        if criterion.mean_token:
            rows.insert(0, outputs[image].mean(0))
            acts.insert(0, activations[:, image].mean(1))
        hit = [a for r, a in zip(rows, acts, strict=True) if np.linalg.norm(r) > 20]
        if not hit:
            continue
        scores[image] = np.mean(np.abs(hit), axis=0)
        if criterion.sparsity is not None:
            idle = np.sum(np.array(acts) < criterion.sparsity.level, axis=0)
            scores[image] *= idle >= criterion.sparsity.fraction * len(acts)
    return scores


@pytest.mark.parametrize("mean_token", [False, True])
@pytest.mark.parametrize("sparsity", [None, Sparsity(level=0.3, fraction=0.7)])
def test_scores_equal_a_loop(mean_token: bool, sparsity: Sparsity | None) -> None:
    activations, outputs = _data()
    criterion = Criterion(20.0, mean_token=mean_token, sparsity=sparsity)
    outliers = outlier_mask(token_norms(outputs, mean_token), criterion)
    got = np.asarray(score_images(activations, outliers, criterion))
    want = _loop(activations, outputs, criterion)
    np.testing.assert_allclose(got[:3], want[:3], rtol=1e-5)
    assert np.isnan(want[3]).all() and not outliers[3].any()


def test_the_mean_token_can_be_an_outlier() -> None:
    _, outputs = _data()
    outputs[:] = 0
    outputs[0] = 40
    norms = token_norms(outputs, mean_token=True)
    assert outlier_mask(norms, Criterion(20.0))[0].all()


def test_prefix_and_suffix_rows_are_no_outliers() -> None:
    norms = np.full((1, 8), 99.0)
    marks = outlier_mask(norms, Criterion(20.0, mean_token=True, num_prefix=2, num_suffix=1))
    np.testing.assert_array_equal(marks[0], [1, 0, 0, 1, 1, 1, 1, 0])


def test_table_averages_counted_images_only() -> None:
    activations, outputs = _data()
    criterion = Criterion(20.0)
    outliers = np.asarray(outlier_mask(token_norms(outputs, True), criterion))
    scores = np.asarray(score_images(activations, outliers, criterion))
    whole, parts = ScoreTable(DEPTH, UNITS), ScoreTable(DEPTH, UNITS)
    whole.add(scores, outliers)
    for rows in (slice(0, 1), slice(1, 4)):
        parts.add(scores[rows], outliers[rows])
    assert (whole.images, whole.counted) == (parts.images, parts.counted) == (4, 3)
    want = np.nanmean(_loop(activations, outputs, criterion), axis=0)
    np.testing.assert_allclose(whole.mean, want, rtol=1e-5)
    np.testing.assert_array_equal(whole.mean, parts.mean)


def test_ties_are_ranked_in_index_order() -> None:
    scores = np.array([[1.0, 3.0, 2.0], [3.0, 0.0, 2.0]])
    assert rank_neurons(scores) == [(0, 1), (1, 0), (0, 2), (1, 2), (0, 0), (1, 1)]
