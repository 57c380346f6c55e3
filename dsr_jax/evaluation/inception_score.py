"""Inception Score, in float64 on the host and without keeping the logits.

Source: ADM evaluator (chunks of 5000 in file order, logits without bias); spec evaluation 6.2.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np

from dsr_jax.core.errors import EvaluationError
from dsr_jax.evaluation.image_sets import ImageSet
from dsr_jax.evaluation.metric import Metric

SPLIT_SIZE = 5000
"""Rows of one chunk in the ADM evaluator."""


class InceptionScore:
    """exp of the mean KL divergence of class probabilities from their mean, by chunks of rows.

    A chunk needs only the sum of its probabilities and of their negative entropies, since
    E[sum p (log p - log E p)] = E[sum p log p] - sum E p log E p. Rows must come in file order:
    the mean over chunks depends on it.

    Args:
      num_classes: Width K of the logits.
      split_size: Rows per chunk; a shorter last one counts as much as the others.
    """

    def __init__(self, num_classes: int, split_size: int = SPLIT_SIZE) -> None:
        self.split_size = split_size
        self.count = 0
        self._sums = np.zeros((0, num_classes))
        self._negative_entropies = np.zeros(0)

    def update(self, logits: np.ndarray) -> None:
        """Adds the next rows of logits [B, K].

        Raises:
          EvaluationError: If the width differs or a value is not finite.
        """
        logits = np.asarray(logits, np.float64)
        if logits.ndim != 2 or logits.shape[1] != self._sums.shape[1]:
            raise EvaluationError(
                f"logits have shape {logits.shape}, expected [B, {self._sums.shape[1]}]"
            )
        if not np.isfinite(logits).all():
            raise EvaluationError(
                f"logits of rows from {self.count} on are not finite",
                "check those samples and the feature network's weights",
            )
        while len(logits):
            free = self.split_size - self.count % self.split_size
            self._add(logits[:free])
            logits = logits[free:]

    def _add(self, logits: np.ndarray) -> None:
        if self.count % self.split_size == 0:
            self._sums = np.concatenate([self._sums, np.zeros((1, self._sums.shape[1]))])
            self._negative_entropies = np.append(self._negative_entropies, 0.0)
        logits = logits - logits.max(axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        self._sums[-1] += p.sum(axis=0)
        # A probability that underflows to 0 adds 0, where the official float32 code gives NaN.
        self._negative_entropies[-1] += (p * log_p).sum()
        self.count += len(logits)

    def chunks(self) -> np.ndarray:
        """Returns the score of every chunk so far.

        Raises:
          EvaluationError: If there are no rows.
        """
        if not self.count:
            raise EvaluationError(
                "an Inception Score needs at least one sample", "score at least one"
            )
        rows = np.full(len(self._sums), self.split_size, np.float64)
        rows[-1] = self.count - self.split_size * (len(rows) - 1)
        mean = self._sums / rows[:, None]
        log_mean = np.log(mean, where=mean > 0, out=np.zeros_like(mean))
        return np.exp(self._negative_entropies / rows - (mean * log_mean).sum(axis=1))

    def score(self) -> float:
        """Returns the mean over the chunks."""
        return float(self.chunks().mean())

    def state(self) -> dict[str, np.ndarray]:
        """Returns the arrays from which `restore` continues."""
        return {
            "count": np.asarray(self.count),
            "sums": self._sums,
            "negative_entropies": self._negative_entropies,
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continues from what `state` returned."""
        self.count = int(state["count"])
        self._sums = np.array(state["sums"])
        self._negative_entropies = np.array(state["negative_entropies"])


def score_splits(logits: np.ndarray, edges: Sequence[int]) -> np.ndarray:
    """Returns the score of each range of rows between consecutive edges, as in torch-fidelity."""
    found = []
    for first, end in zip(edges, edges[1:], strict=False):
        one = InceptionScore(logits.shape[1], end - first)
        one.update(logits[first:end])
        found.append(one.score())
    return np.array(found)


class IS(Metric):
    """Inception Score as the ADM evaluator computes it."""

    name: ClassVar[str] = "is"
    needs: ClassVar[frozenset[str]] = frozenset(("logits",))
    needs_reference: ClassVar[bool] = False

    def __init__(self) -> None:
        self._score: InceptionScore | None = None

    def update(self, batch: Mapping[str, np.ndarray]) -> None:
        """Adds logits; errors as in `InceptionScore.update`."""
        if self._score is None:
            self._score = InceptionScore(batch["logits"].shape[-1])
        self._score.update(batch["logits"])

    def compute(self, reference: Self | None) -> dict[str, float]:
        """Returns "inception_score"."""
        score = self._score or InceptionScore(0)
        return {"inception_score": score.score()}

    def recipe(self, reference: Self | None) -> dict[str, Any]:
        """Returns how rows are split, and that logits have no bias."""
        return {"inception_score": {"rows_per_split": SPLIT_SIZE, "bias": False}}

    def warnings(self, images: ImageSet) -> list[str]:
        """Points out samples that are sorted by class."""
        labels = images.labels
        if labels is None or images.shape[0] <= SPLIT_SIZE:
            return []
        if (np.diff(labels) < 0).any() or labels[0] == labels[-1]:
            return []
        return [
            "samples are sorted by class: the Inception Score, taken over runs of "
            f"{SPLIT_SIZE}, is far too low; shuffle them"
        ]

    def state(self) -> dict[str, np.ndarray]:
        """Returns the sums."""
        return {} if self._score is None else self._score.state()

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continues from the sums."""
        if state:
            self._score = InceptionScore(state["sums"].shape[1])
            self._score.restore(state)
