"""Scores hidden MLP units by their activation on outlier tokens, per image and over many images.

Source: test-time-registers shared/algorithms.py find_register_neurons; DSR ttreg; spec encoder 6.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from dsr_jax.core.typing import Array


@dataclass(frozen=True)
class Sparsity:
    """Drops units that are active on most tokens of an image.

    Attributes:
      level: Signed activation below which a unit is idle on a token.
      fraction: Fraction of tokens on which a unit must be idle.
    """

    level: float = 0.5
    fraction: float = 0.5


@dataclass(frozen=True)
class Criterion:
    """Defines which tokens are outliers and which units are scored.

    Attributes:
      threshold: Norm above which a token is an outlier; may be traced.
      mean_token: Adds the mean over the sequence as a row of its own, of the outputs and of the
        activations. The original code was written for encoders with a class token in row 0 and
        puts this row there for SigLIP2; it can be an outlier like any other row.
      num_prefix: Rows (class token, trained registers) before the patches that cannot be outliers.
      num_suffix: Rows (test-time registers) after the patches that cannot be outliers.
      sparsity: The filter, or None.
    """

    threshold: float | Array
    mean_token: bool = True
    num_prefix: int = 0
    num_suffix: int = 0
    sparsity: Sparsity | None = None


def token_norms(outputs: Array, mean_token: bool) -> Array:
    """Returns norms [B, T] of tokens [B, T, D], or [B, 1+T] with that of the mean token first."""
    if mean_token:
        outputs = jnp.concatenate([outputs.mean(axis=1, keepdims=True), outputs], axis=1)
    return jnp.linalg.norm(outputs.astype(jnp.float32), axis=-1)


def outlier_mask(norms: Array, criterion: Criterion) -> Array:
    """Marks the outliers [B, rows], bool, among the rows of `token_norms`."""
    rows = jnp.arange(norms.shape[1])
    first = int(criterion.mean_token)
    inner = (rows >= first + criterion.num_prefix) & (rows < len(rows) - criterion.num_suffix)
    return (norms > criterion.threshold) & (inner | (rows < first))


def score_images(activations: Array, outliers: Array, criterion: Criterion) -> Array:
    """Means of |activation| over each image's outliers.

    Args:
      activations: Hidden MLP units after the nonlinearity and the intervention [L, B, T, M].
      outliers: [B, rows] result of `outlier_mask`; rows = T, or 1+T with the mean token.
      criterion: The same that made `outliers`.

    Returns:
      [B, L, M], float32; zeros for an image without outliers.
    """
    activations = activations.astype(jnp.float32)
    marks = outliers.astype(jnp.float32)
    rows = marks[:, 1:] if criterion.mean_token else marks
    # Unlike an einsum, this fuses, so that |activations| is never materialized.
    total = jnp.sum(jnp.abs(activations) * rows[..., None], axis=2).swapaxes(0, 1)
    if criterion.mean_token:
        mean = activations.mean(axis=2).swapaxes(0, 1)
        total = total + marks[:, 0, None, None] * jnp.abs(mean)
    scores = total / jnp.maximum(marks.sum(axis=1), 1)[:, None, None]
    if criterion.sparsity is None:
        return scores
    idle = jnp.sum(activations < criterion.sparsity.level, axis=2).swapaxes(0, 1)
    if criterion.mean_token:
        idle = idle + (mean < criterion.sparsity.level)
    return jnp.where(idle >= criterion.sparsity.fraction * marks.shape[1], scores, 0.0)


class ScoreTable:
    """Running mean of the score tables of the images that have outliers.

    Attributes:
      images: Images seen.
      counted: Images that have outliers.
    """

    def __init__(self, depth: int, mlp_dim: int) -> None:
        # float64, so that the sum over images hardly depends on the batches.
        self._sum = np.zeros((depth, mlp_dim), np.float64)
        self.images = self.counted = 0

    def add(self, scores: np.ndarray, outliers: np.ndarray) -> None:
        """Adds the tables [B, L, M] of a batch with the marks [B, rows] that they belong to."""
        counted = np.any(outliers, axis=1)
        self.images += len(outliers)
        self.counted += int(np.sum(counted))
        self._sum += scores[counted].sum(axis=0, dtype=np.float64)

    @property
    def mean(self) -> np.ndarray:
        """Mean scores [L, M], float64; zeros before any image was counted."""
        return self._sum / max(self.counted, 1)


def rank_neurons(scores: np.ndarray) -> list[tuple[int, int]]:
    """Returns all (block, unit) pairs of a table [L, M], highest score first, then by index."""
    order = np.argsort(-scores, axis=None, kind="stable")
    blocks, units = np.unravel_index(order, scores.shape)
    return list(zip(blocks.tolist(), units.tolist(), strict=True))
