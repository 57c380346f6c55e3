"""Latent statistics: exact, the same in any batches, and restored to the bit."""

import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError, NumericsError
from dsr_jax.spaces.statistics import LatentStatistics

SHAPE = (2, 3, 5)


def latents(count: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (scale * random.standard_normal((count, *SHAPE))).astype(np.float32)


def gather(*batches: np.ndarray) -> LatentStatistics:
    statistics = LatentStatistics(SHAPE)
    for batch in batches:
        statistics.update(batch)
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


def test_batches_do_not_matter() -> None:
    rows = latents(64, scale=30)
    want = gather(rows).finish()
    for sizes in ([21, 22], [1, 2, 3], range(1, 64)):
        found = gather(*np.split(rows, sizes)).finish()
        for name, value in want.items():
            np.testing.assert_array_equal(found[name], value)


def test_a_state_goes_on_to_the_bit() -> None:
    rows = latents(30)
    first = gather(rows[:11])
    state = first.state()
    first.update(rows[11:])
    second = LatentStatistics.from_state(state, SHAPE)
    second.update(rows[11:])
    for name, value in first.finish().items():
        np.testing.assert_array_equal(second.finish()[name], value)
    assert first.count == second.count == 30


def test_what_cannot_be_is_named() -> None:
    statistics = gather(latents(20))
    bad = latents(20)
    bad[18, 0, 0, 0] = np.nan
    with pytest.raises(NumericsError, match="latent 38 is not finite"):
        statistics.update(bad)
    with pytest.raises(ConfigError, match="another encoder"):
        statistics.update(np.zeros((1, 2, 3, 4), np.float32))
    with pytest.raises(ConfigError, match="of an earlier version"):
        LatentStatistics.from_state({"count": np.asarray(1), "sums": np.zeros(3)}, SHAPE)
    with pytest.raises(ConfigError, match="at least one latent"):
        LatentStatistics(SHAPE).finish()
