"""Mean and variance of latents over a data set.

Source: DSR src/tools (latent statistics); spec encoder 11.
"""

from collections.abc import Mapping

import numpy as np

from dsr_jax.core.errors import ConfigError, NumericsError
from dsr_jax.core.moments import Moments


class LatentStatistics(Moments):
    """Mean and population variance of latents, per channel and position.

    The same latents in the same order give the same bits, whatever the batches are and wherever
    the pass was interrupted.

    Args:
      shape: Shape of one latent.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape, covariance=False)

    def update(self, rows: np.ndarray) -> None:
        """Adds latents [B, *shape].

        Raises:
          ConfigError: If they are of another shape.
          NumericsError: If one is not finite.
        """
        if rows.shape[1:] != self.shape:
            raise ConfigError(
                f"latents of {rows.shape[1:]} for statistics of {self.shape}",
                "start new statistics for another encoder or image size",
            )
        finite = np.isfinite(rows).reshape(len(rows), -1).all(axis=1)
        if not finite.all():
            raise NumericsError(
                f"latent {self.count + int(np.argmin(finite))} is not finite",
                "check the encoder's weights and that image",
            )
        super().update(rows)

    def finish(self) -> dict[str, np.ndarray]:
        """Returns "mean" and population variance "var" of the latents so far, float32.

        Raises:
          ConfigError: If there are none.
        """
        if not self.count:
            raise ConfigError(
                "statistics need at least one latent", "give a data set that is not empty"
            )
        mean, scatter = self.mean_and_scatter()
        return {"mean": mean.astype(np.float32), "var": (scatter / self.count).astype(np.float32)}

    @classmethod
    def from_state(
        cls, state: Mapping[str, np.ndarray], shape: tuple[int, ...]
    ) -> "LatentStatistics":
        """Restores what `state` returned for latents of this shape.

        Raises:
          ConfigError: If the arrays are of another version or shape.
        """
        if "scatter" not in state or state["scatter"].shape != shape:
            raise ConfigError(
                f"the saved sums are not of latents {shape}, or of an earlier version of dsr_jax",
                "delete the folder of the unfinished pass, or name another one",
            )
        statistics = cls(shape)
        statistics.restore(state)
        return statistics
