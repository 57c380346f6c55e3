"""Latent statistics: exact, the same in any order and grouping, and restored to the bit."""

from fractions import Fraction

import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError, NumericsError
from dsr_jax.spaces.statistics import LatentStatistics

SHAPE = (2, 3, 5)


def latents(count: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (scale * random.standard_normal((count, *SHAPE))).astype(np.float32)


def gather(*batches: np.ndarray) -> LatentStatistics:
    statistics = LatentStatistics.empty(SHAPE)
    for batch in batches:
        statistics.add(batch)
    return statistics


def test_mean_and_population_variance() -> None:
    rows = latents(50) + 3
    found = gather(rows[:7], rows[7:]).finish()
    np.testing.assert_allclose(found["mean"], rows.mean(0, dtype=float), rtol=1e-6)
    np.testing.assert_allclose(found["var"], rows.var(0, dtype=float), rtol=1e-6)
    assert found["mean"].dtype == found["var"].dtype == np.float32


def test_a_large_mean_does_not_swallow_a_small_variance() -> None:
    rows = (1000 + latents(200, scale=1e-2)).astype(np.float32)
    np.testing.assert_allclose(gather(rows).finish()["var"], rows.var(0, dtype=float), rtol=1e-4)
    constant = np.full((9, *SHAPE), np.float32(0.1))
    assert (gather(constant).finish()["var"] < 1e-9).all()


def test_sums_are_exact_fractions() -> None:
    rows = latents(37, scale=50)
    rows[0, 0, 0, 0] = 5000
    statistics = gather(rows)
    high, low = statistics.sums[:, :, 0, 0, 0].swapaxes(0, 1)
    column = [Fraction(float(x)) for x in rows[:, 0, 0, 0]]
    unit = Fraction(1, 2**32)
    for row, values in enumerate((column, [x * x for x in column])):
        want = sum(round(value / unit) for value in values)
        assert int(high[row]) * 2**32 + int(low[row]) == want


def test_order_grouping_and_merging_do_not_matter() -> None:
    rows = latents(64, scale=30)
    want = gather(rows)
    shuffled = rows[np.random.default_rng(1).permutation(64)]
    parts = gather(shuffled[:21]), gather(shuffled[21:22], shuffled[22:])
    parts[1].merge(parts[0])
    np.testing.assert_array_equal(parts[1].sums, want.sums)
    assert parts[1].count == want.count == 64
    for name, value in want.finish().items():
        np.testing.assert_array_equal(parts[1].finish()[name], value)


def test_sums_pass_the_range_of_one_integer() -> None:
    """2 ** 64 units of 2 ** -32 are 2 ** 32; squares of 8000 get there in a few doublings."""
    statistics = gather(np.full((16, *SHAPE), np.float32(8000)))
    for _ in range(30):
        statistics.merge(LatentStatistics.from_state(statistics.state()))
    found = statistics.finish()
    assert statistics.count == 16 * 2**30
    np.testing.assert_array_equal(found["mean"], np.float32(8000))
    np.testing.assert_allclose(found["var"], 0, atol=1e-6)


def test_a_state_goes_on_to_the_bit() -> None:
    rows = latents(30)
    first = gather(rows[:11])
    state = first.state()
    first.add(rows[11:])
    second = LatentStatistics.from_state(state)
    second.add(rows[11:])
    np.testing.assert_array_equal(first.sums, second.sums)
    assert first.count == second.count == 30


def test_what_cannot_be_is_named() -> None:
    statistics = gather(latents(20))
    bad = latents(20)
    bad[18, 0, 0, 0] = np.nan
    with pytest.raises(NumericsError, match="latents 36 to 39 hold a value of magnitude nan"):
        statistics.add(bad)
    bad[18, 0, 0, 0] = 1e6
    with pytest.raises(NumericsError, match="magnitude 1e"):
        gather(bad)
    with pytest.raises(ConfigError, match="another encoder"):
        statistics.add(np.zeros((1, 2, 3, 4), np.float32))
    with pytest.raises(ConfigError, match="do not merge"):
        statistics.merge(LatentStatistics.empty((2, 3)))
    with pytest.raises(ConfigError, match="no latents"):
        LatentStatistics.empty(SHAPE).finish()
