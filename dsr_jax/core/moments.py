"""Mean and covariance, or variance, of rows that arrive in batches, in float64 on the host."""

from collections.abc import Mapping

import numpy as np

COVARIANCE_BLOCK = 1024
"""Number of rows whose scatter matrix is computed as one matmul."""
VARIANCE_BLOCK = 16
"""Number of rows whose squares are summed at once; few, since a row may be an image's latent."""


class Moments:
    """Moments of rows that arrive in batches.

    Mean and centered scatter of blocks of rows are merged pairwise (Chan, Golub and LeVeque 1979),
    so that no large sums of squares cancel. Blocks do not depend on batches: the same rows in the
    same order give the same bits, also after a restart; in another order they differ by float64
    rounding.

    Args:
      shape: Shape of one row.
      covariance: Whether to keep the scatter of all pairs of values, for rows that are vectors, or
        only that of each value with itself.

    Attributes:
      shape: Shape of one row.
    """

    def __init__(self, shape: tuple[int, ...], *, covariance: bool) -> None:
        self.shape, self._covariance = shape, covariance
        self._block = COVARIANCE_BLOCK if covariance else VARIANCE_BLOCK
        self._count = 0
        self._mean = np.zeros(shape)
        self._scatter = np.zeros(shape * 2 if covariance else shape)
        self._waiting = np.zeros((0, *shape))

    @property
    def count(self) -> int:
        """Number of rows so far."""
        return self._count + len(self._waiting)

    def update(self, rows: np.ndarray) -> None:
        """Adds finite rows [B, *shape] of any float type.

        Raises:
          ValueError: If they have another shape.
        """
        if rows.shape[1:] != self.shape:
            raise ValueError(f"rows of {rows.shape[1:]} for moments of {self.shape}")
        while len(rows):
            free = self._block - len(self._waiting)
            self._waiting = np.concatenate([self._waiting, rows[:free].astype(np.float64)])
            rows = rows[free:]
            if len(self._waiting) == self._block:
                self._add_waiting()

    def mean_and_scatter(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the mean and the scatter: the sum of products of differences from the mean."""
        whole = Moments(self.shape, covariance=self._covariance)
        whole.restore(self.state())
        whole._add_waiting()
        return whole._mean, whole._scatter

    def state(self) -> dict[str, np.ndarray]:
        """Returns the arrays from which `restore` continues."""
        return {
            "count": np.asarray(self._count),
            "mean": self._mean,
            "scatter": self._scatter.copy(),
            "waiting": self._waiting,
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continues from what `state` returned."""
        self._count, self._waiting = int(state["count"]), np.array(state["waiting"])
        self._mean, self._scatter = np.array(state["mean"]), np.array(state["scatter"])

    def _add_waiting(self) -> None:
        """Merges the waiting rows into the sums."""
        if not (rows := len(self._waiting)):
            return
        mean = self._waiting.mean(axis=0)
        centered = self._waiting - mean
        self._waiting = self._waiting[:0]
        total = self._count + rows
        step = mean - self._mean
        weighted = step * (self._count * rows / total)
        self._mean = self._mean + step * (rows / total)
        # In place, since a copy of the matrix of 2048 features is 32 MiB.
        if self._covariance:
            self._scatter += centered.T @ centered
            self._scatter += np.outer(weighted, step)
        else:
            self._scatter += np.square(centered).sum(axis=0)
            self._scatter += weighted * step
        self._count = total
