"""Improved precision and recall by nearest neighbors, block by block on the device.

Source: Kynkaanniemi et al. 2019, as the ADM evaluator computes it; spec evaluation 6.3.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.core.errors import EvaluationError
from dsr_jax.core.typing import Array
from dsr_jax.evaluation.metric import PooledFeatureMetric

NEIGHBOR = 3
ROWS = 1024
"""Rows of one block; its distances to all others are the largest array."""


class PrecisionRecall(NamedTuple):
    """Fractions of points inside the other set's manifold, and whether each point is.

    Attributes:
      precision: Fraction of samples within the radius of a reference point.
      recall: Fraction of reference points within the radius of a sample.
      sample_inside: [N], bool.
      reference_inside: [M], bool.
    """

    precision: float
    recall: float
    sample_inside: np.ndarray
    reference_inside: np.ndarray


@jax.jit
def _squared_distances(rows: Array, columns: Array) -> Array:
    """Returns squared Euclidean distances [b, M], at least 0."""
    inner = jnp.matmul(rows, columns.T, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.sum(jnp.square(rows), axis=1)[:, None] + jnp.sum(jnp.square(columns), axis=1)
    return jnp.maximum(norms - 2 * inner, 0)


@jax.jit
def _nearest(distances: Array) -> Array:
    """Returns the smallest distances of each row [b, 4], ascending.

    XLA's CPU backend selects only where nothing is fused with it, not even a slice of the result;
    otherwise it sorts whole rows, which takes 70 times as long.
    """
    return -jax.lax.top_k(-distances, NEIGHBOR + 1)[0]


@jax.jit
def _inside(
    rows: Array, columns: Array, row_radii: Array, column_radii: Array
) -> tuple[Array, Array]:
    """Whether each row is within a column's radius [b], and each column within a row's [M]."""
    distances = _squared_distances(rows, columns)
    return (
        jnp.any(distances <= column_radii, axis=1),
        jnp.any(distances <= row_radii[:, None], axis=0),
    )


def _blocks(count: int) -> Iterator[slice]:
    for first in range(0, count, ROWS):
        yield slice(first, min(first + ROWS, count))


def neighbor_radii(features: Array) -> np.ndarray:
    """Returns the squared distance of every point [N, D] to its third neighbor [N], float32.

    Raises:
      EvaluationError: If there are too few points.
    """
    if len(features) <= NEIGHBOR:
        raise EvaluationError(
            f"{len(features)} points have no third neighbor",
            "precision and recall need thousands of samples and reference images",
        )
    # A point is the nearest to itself, so that its third neighbor comes fourth.
    found = [
        np.asarray(_nearest(_squared_distances(features[rows], features)))[:, -1]
        for rows in _blocks(len(features))
    ]
    return np.concatenate(found)


def precision_recall(samples: np.ndarray, reference: np.ndarray) -> PrecisionRecall:
    """Returns precision and recall of samples [N, D] against a reference [M, D].

    Distances are float32; the official ones are float16, whose ties raise both fractions by about
    0.001 to 0.003. Both sets are moved by the reference's mean first, which changes no distance but
    spares the digits that large norms would cost. Both counts belong to the result: fewer samples
    lower the recall, and a larger reference raises the precision.

    Raises:
      EvaluationError: If widths differ, or there are too few points.
    """
    if samples.ndim != 2 or samples.shape[1:] != reference.shape[1:]:
        raise EvaluationError(
            f"features are {samples.shape} and {reference.shape}",
            "compare features of the same network and layer",
        )
    center = np.mean(reference, axis=0, dtype=np.float64)
    ours, theirs = (
        jnp.asarray(np.asarray(x, np.float32) - center.astype(np.float32))
        for x in (samples, reference)
    )
    radii = neighbor_radii(ours)
    reference_radii = jnp.asarray(neighbor_radii(theirs))
    sample_inside = []
    reference_inside = np.zeros(len(reference), bool)
    for rows in _blocks(len(samples)):
        inside, covered = _inside(ours[rows], theirs, jnp.asarray(radii[rows]), reference_radii)
        sample_inside.append(np.asarray(inside))
        reference_inside |= np.asarray(covered)
    hits = np.concatenate(sample_inside)
    return PrecisionRecall(
        float(hits.mean()), float(reference_inside.mean()), hits, reference_inside
    )


class PR(PooledFeatureMetric):
    """Precision and recall as the ADM evaluator computes them, with distances in float32."""

    name: ClassVar[str] = "pr"
    min_images: ClassVar[int] = NEIGHBOR + 1

    def compute(self, reference: Self | None) -> dict[str, float]:
        """Returns "precision" and "recall"; errors as in `precision_recall`."""
        assert reference is not None
        found = precision_recall(self.features(), reference.features())
        return {"precision": found.precision, "recall": found.recall}

    def recipe(self, reference: Self | None) -> dict[str, Any]:
        """Returns the number of neighbors and of reference images."""
        assert reference is not None
        settings = {
            "neighbour": NEIGHBOR,
            "distances": "float32",
            "reference_images": reference.count,
        }
        return {"precision_recall": settings}
