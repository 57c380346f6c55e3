"""Training times: distribution, support and dimension shift.

Source: DSR stage2/transport/transport.py; spec denoiser 5.4.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array


def shift_time(t: Array, shift: float) -> Array:
    """Multiplies the odds of t by `shift` >= 1, which moves times towards noise."""
    return shift * t / (1 + (shift - 1) * t)


def default_eps(path: str, prediction: str) -> float:
    """Returns the distance from the ends of time at which a prediction is not singular."""
    if path.startswith("vp"):
        return 1e-5
    return 1e-3 if prediction in ("noise", "score") else 0.0


def time_support(path: str, prediction: str, eps: float | None = None) -> tuple[float, float]:
    """Returns the lowest and highest training time before the shift."""
    if prediction == "data":
        return 0.0, 1.0
    if prediction == "velocity":
        # DSR-compat: the original stops short of pure noise here, though nothing is singular.
        return (0.0, 1 - 1e-5) if path.startswith("vp") else (0.0, 0.999)
    eps = default_eps(path, prediction) if eps is None else eps
    return eps, 1 - eps


def choose_range(time_range: Sequence[float], default: tuple[float, float]) -> tuple[float, float]:
    """Returns the range that a config names, or the default where it names none.

    Raises:
      ConfigError: If it is not a pair of increasing times in [0, 1].
    """
    if not time_range:
        return default
    if len(time_range) != 2 or not 0 <= time_range[0] < time_range[1] <= 1:
        raise ConfigError(
            f"config.objective.time_range={tuple(time_range)}",
            "use (LOW,HIGH) within 0 and 1, as SiT's (0.0,1.0), or () for the prediction's own",
        )
    return (time_range[0], time_range[1])


@dataclass(frozen=True)
class TimeSampler:
    """Maps uniform numbers to training times by the inverse distribution function.

    Attributes:
      distribution: "uniform" or "logit-normal".
      mu: Mean of logit(t).
      sigma: Standard deviation of logit(t).
      t_min: Lowest time before the shift.
      t_max: Highest time before the shift.
      shift: Factor on the odds of t, at least 1.
    """

    distribution: str = "uniform"
    mu: float = 0.0
    sigma: float = 1.0
    t_min: float = 0.0
    t_max: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.shift < 1:
            raise ConfigError(f"config.objective.time_shift={self.shift}", "use 1 or more")
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ConfigError(f"times from {self.t_min} to {self.t_max} are not within [0, 1]")
        if self.distribution not in ("uniform", "logit-normal") or self.sigma <= 0:
            raise ConfigError(
                f"time distribution {self.distribution!r} with sigma {self.sigma}",
                "use 'uniform' or 'logit-normal_MU_SIGMA' with positive SIGMA",
            )

    def __call__(self, u: Array) -> Array:
        """Maps uniform numbers [B] in [0, 1) to times [B]."""
        if self.distribution == "uniform":
            t = self.t_min + (self.t_max - self.t_min) * u
        else:
            low, high = self._mass_below(self.t_min), self._mass_below(self.t_max)
            t = jax.nn.sigmoid(self.mu + self.sigma * ndtri(low + (high - low) * u))
            t = jnp.clip(t, self.t_min, self.t_max)
        return shift_time(t, self.shift)

    def _mass_below(self, t: float) -> float:
        """Returns the fraction of the untruncated distribution below t."""
        if t in (0.0, 1.0):
            return t
        return statistics.NormalDist(self.mu, self.sigma).cdf(math.log(t / (1 - t)))


def make_time_sampler(
    distribution: str,
    path: str,
    prediction: str,
    shift: float = 1.0,
    time_range: Sequence[float] = (),
) -> TimeSampler:
    """Builds a sampler from config values.

    Args:
      distribution: "uniform" or "logit-normal_MU_SIGMA".
      path: Name of the path.
      prediction: Kind of prediction, which determines the support.
      shift: Factor on the odds of t.
      time_range: Lowest and highest time before the shift; () for those of `time_support`.

    Raises:
      ConfigError: If the distribution or the range cannot be read.
    """
    kind, *numbers = distribution.split("_")
    t_min, t_max = choose_range(time_range, time_support(path.lower(), prediction))
    try:
        mu, sigma = (float(n) for n in numbers) if kind == "logit-normal" else (0.0, 1.0)
        if kind == "uniform" and numbers:
            raise ValueError
    except ValueError as error:
        raise ConfigError(
            f"config.objective.time_distribution={distribution!r}",
            "use 'uniform' or for example 'logit-normal_0_1'",
        ) from error
    return TimeSampler(kind, mu, sigma, t_min, t_max, shift)
