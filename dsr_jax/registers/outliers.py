"""Where the norms of tokens fall into two populations, and how many there are."""

from dataclasses import dataclass

import numpy as np

LEAST_RATIO = 1.5
"""A second population whose median norm is nearer to the first's is not called outliers."""

_LEAST_SPREAD = 0.02
_LEAST_DISTANCE = 5.0
_DEEPEST_VALLEY = 0.5


@dataclass(frozen=True)
class Split:
    """Two populations of norms, if there are two.

    Attributes:
      threshold: The norm that divides them; None for one population.
      low: Median norm of the lower one, or of all.
      high: Median norm of the upper one; None for one population.
      share: Share of the norms in the upper one.
    """

    threshold: float | None
    low: float
    high: float | None
    share: float


def split_norms(norms: np.ndarray) -> Split:
    """Divides norms into an ordinary population and a smaller one of outliers above it.

    On the logarithms, the threshold is that of least classification error for two normal
    distributions of unequal size and width. It counts only if the upper one lies far above the
    lower, and if there is a valley between them: the tail of one skewed population has none.

    Source: Kittler and Illingworth 1986, "Minimum Error Thresholding".

    Args:
      norms: Positive numbers of any shape.
    """
    values = np.sort(np.log(np.maximum(np.asarray(norms, np.float64).ravel(), 1e-12)))
    whole = Split(None, float(np.exp(np.median(values))), None, 0.0)
    if len(values) < 3 or values[-1] - values[0] < np.log(LEAST_RATIO):
        return whole
    # Of the whole, which outliers hardly change: half the population lies within.
    spread = max(float(np.diff(np.quantile(values, (0.25, 0.75)))[0]) / 1.349, _LEAST_SPREAD)
    count = _least_error_count(values, spread / 2)
    low, high = values[:count], values[count:]
    apart = np.median(high) - np.median(low)
    threshold = (low[-1] + high[0]) / 2
    clear = apart > max(_LEAST_DISTANCE * spread, np.log(LEAST_RATIO))
    if not clear or not _has_valley(values, threshold, max(high.std(), spread / 2)):
        return whole
    return Split(
        threshold=float(np.exp(threshold)),
        low=float(np.exp(np.median(low))),
        high=float(np.exp(np.median(high))),
        share=len(high) / len(values),
    )


def _least_error_count(values: np.ndarray, least_spread: float) -> int:
    """How many of the sorted values belong to the lower population, at least half."""
    total = len(values)
    counts = np.arange(1, total)
    sums, squares = np.cumsum(values), np.cumsum(values**2)

    def error(count: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        variance = np.maximum(second / count - (first / count) ** 2, least_spread**2)
        share = count / total
        return share * (0.5 * np.log(variance) - np.log(share))

    both = error(counts, sums[:-1], squares[:-1])
    both += error(total - counts, sums[-1] - sums[:-1], squares[-1] - squares[:-1])
    # Equal values belong together, and outliers are the minority.
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
    return bool(within(between).min() <= _DEEPEST_VALLEY * counts.max())
