"""Mean and variance of latents over a data set, exact in whatever order they come.

Source: DSR src/tools (latent statistics); spec encoder 11.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dsr_jax.core.errors import ConfigError, NumericsError

_FRACTION_BITS = 32
_LIMB_BITS = 32
_ROWS = 16
"""Latents whose sum is taken in one go, before its parts are divided; few, so that they fit."""
_LIMIT = 2.0 ** (62 - _FRACTION_BITS) / _ROWS
"""Bound of a square for which they do: latents up to 8191."""


@dataclass
class LatentStatistics:
    """Sums of latents and of their squares, per channel and position.

    Each value is rounded once, to a multiple of 2**-32, and from there on sums are integers. So
    they do not depend on the order or the grouping of batches, and parts that were added up on
    several hosts, or before and after an interruption, merge to the same bits. A sum of floats,
    even of 64 bits, would differ in its last digits. Sums of a billion latents of 1000 fit.

    Attributes:
      count: Latents added.
      sums: [2, 2, *shape], int64: latents, then squares; each as a high and a low part of 32 bits.
    """

    count: int
    sums: np.ndarray

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> "LatentStatistics":
        """Statistics of no latents yet, of this shape each."""
        return cls(0, np.zeros((2, 2, *shape), np.int64))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one latent."""
        return self.sums.shape[2:]

    def add(self, latents: np.ndarray) -> None:
        """Adds latents [B, *shape]; squares are taken in float64.

        Raises:
          ConfigError: If they are of another shape.
          NumericsError: If one is not finite, or too large to be a latent.
        """
        if latents.shape[1:] != self.shape:
            raise ConfigError(
                f"latents of {latents.shape[1:]} for statistics of {self.shape}",
                "start new statistics for another encoder or image size",
            )
        for first in range(0, len(latents), _ROWS):
            wide = latents[first : first + _ROWS].astype(np.float64)
            squares = np.square(wide)
            # Written so that NaN fails, too.
            if not np.max(squares) < _LIMIT:
                raise NumericsError(
                    f"latents {self.count + first} to {self.count + first + len(wide) - 1} hold a "
                    f"value of magnitude {np.max(np.abs(wide)):g}",
                    "check the encoder's weights and the images of that batch",
                )
            for row, values in enumerate((wide, squares)):
                units = np.rint(np.ldexp(values, _FRACTION_BITS)).astype(np.int64)
                self._carry(row, units.sum(axis=0))
        self.count += len(latents)

    def merge(self, other: "LatentStatistics") -> None:
        """Adds what `other` has added.

        Raises:
          ConfigError: If its latents are of another shape.
        """
        if other.shape != self.shape:
            raise ConfigError(
                f"statistics of latents {other.shape} do not merge with those of {self.shape}",
                "merge parts of one encoder and image size",
            )
        self.sums += other.sums
        for row in range(len(self.sums)):
            self._carry(row, np.zeros(self.shape, np.int64))
        self.count += other.count

    def _carry(self, row: int, units: np.ndarray) -> None:
        """Adds `units` of 2**-32 to a sum, and moves what the low part has in excess."""
        high, low = self.sums[row]
        low += units & (2**_LIMB_BITS - 1)
        high += (units >> _LIMB_BITS) + (low >> _LIMB_BITS)
        low &= 2**_LIMB_BITS - 1

    def finish(self) -> dict[str, np.ndarray]:
        """Returns "mean" and population variance "var" of the latents so far, float32.

        Raises:
          ConfigError: If there are none.
        """
        if not self.count:
            raise ConfigError("statistics of no latents", "give a data set that is not empty")
        high, low = self.sums.astype(np.float64).swapaxes(0, 1)
        totals = np.ldexp(high, _LIMB_BITS - _FRACTION_BITS) + np.ldexp(low, -_FRACTION_BITS)
        mean, square = totals / self.count
        variance = np.maximum(square - np.square(mean), 0.0)
        return {"mean": mean.astype(np.float32), "var": variance.astype(np.float32)}

    def state(self) -> dict[str, np.ndarray]:
        """Arrays from which `from_state` goes on."""
        return {"count": np.asarray(self.count, np.int64), "sums": self.sums.copy()}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> "LatentStatistics":
        """Restores what `state` returned."""
        return cls(int(state["count"]), np.array(state["sums"], np.int64))
