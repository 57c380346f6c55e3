"""Splits token norms into ordinary tokens and outliers."""

from dataclasses import dataclass

import numpy as np

MIN_RATIO = 1.5
"""Minimum ratio of the median norms of outliers and ordinary tokens."""

_MIN_STD = 0.02
_MIN_DISTANCE = 5.0
_MAX_VALLEY = 0.5


@dataclass(frozen=True)
class Split:
    """One or two populations of norms.

    Attributes:
      threshold: Norm between the two populations; None for one population.
      low: Median norm of the lower one, or of all.
      high: Median norm of the upper one; None for one population.
      fraction: Fraction of the norms in the upper one.
    """

    threshold: float | None
    low: float
    high: float | None
    fraction: float


def split_norms(norms: np.ndarray) -> Split:
    """Splits norms into an ordinary population and a smaller one of outliers above it.

    The threshold minimizes the classification error of the logarithms for two normal distributions
    of unequal size and standard deviation. It counts only if the upper one is far above the lower,
    and if there is a valley between them, unlike in the tail of one skewed population.

    Source: Kittler and Illingworth 1986, "Minimum Error Thresholding".

    Args:
      norms: Positive numbers of any shape.
    """
    values = np.sort(np.log(np.maximum(np.asarray(norms, np.float64).ravel(), 1e-12)))
    whole = Split(None, float(np.exp(np.median(values))), None, 0.0)
    if len(values) < 3 or values[-1] - values[0] < np.log(MIN_RATIO):
        return whole
    # A robust estimate from the interquartile range, which outliers hardly change.
    std = max(float(np.diff(np.quantile(values, (0.25, 0.75)))[0]) / 1.349, _MIN_STD)
    count = _lower_count(values, std / 2)
    low, high = values[:count], values[count:]
    apart = np.median(high) - np.median(low)
    threshold = (low[-1] + high[0]) / 2
    clear = apart > max(_MIN_DISTANCE * std, np.log(MIN_RATIO))
    if not clear or not _has_valley(values, threshold, max(high.std(), std / 2)):
        return whole
    return Split(
        threshold=float(np.exp(threshold)),
        low=float(np.exp(np.median(low))),
        high=float(np.exp(np.median(high))),
        fraction=len(high) / len(values),
    )


def _lower_count(values: np.ndarray, min_std: float) -> int:
    """Returns the number of sorted values in the lower population, at least half."""
    total = len(values)
    counts = np.arange(1, total)
    sums, squares = np.cumsum(values), np.cumsum(values**2)

    def error(count: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        variance = np.maximum(second / count - (first / count) ** 2, min_std**2)
        fraction = count / total
        return fraction * (0.5 * np.log(variance) - np.log(fraction))

    both = error(counts, sums[:-1], squares[:-1])
    both += error(total - counts, sums[-1] - sums[:-1], squares[-1] - squares[:-1])
    # Equal values stay together, and outliers are the minority.
    both[(values[1:] == values[:-1]) | (counts < total / 2)] = np.inf
    return int(counts[np.argmin(both)])


def _has_valley(values: np.ndarray, threshold: float, width: float) -> bool:
    """Whether sorted values are much rarer somewhere below the upper population's peak."""

    def within(centres: np.ndarray) -> np.ndarray:
        right = np.searchsorted(values, centres + width / 2, side="right")
        return right - np.searchsorted(values, centres - width / 2)

    upper = values[values > threshold]
    counts = within(upper)
    peak = upper[np.argmax(counts)]
    between = np.linspace(threshold - width, max(peak, threshold), 64)
    return bool(within(between).min() <= _MAX_VALLEY * counts.max())
