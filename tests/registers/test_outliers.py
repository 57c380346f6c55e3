"""Splitting norms: two populations are found, one is left alone, whatever its shape."""

import numpy as np
import pytest

from dsr_jax.registers.outliers import split_norms


def ordinary(random: np.random.Generator, count: int = 20_000) -> np.ndarray:
    return np.exp(random.normal(2.3, 0.15, count))


ONE = {
    "normal": ordinary,
    "gamma": lambda r: r.gamma(4, 3, 20_000),
    "exponential": lambda r: r.exponential(3, 20_000),
    "wide": lambda r: np.exp(r.normal(2, 0.8, 20_000)),
    "uniform": lambda r: r.uniform(5, 15, 5_000),
    "heavy tail": lambda r: np.exp(0.2 * r.standard_t(3, 10_000) + 2),
    "few": lambda r: np.linalg.norm(r.normal(size=(36, 32)), axis=-1),
    "equal": lambda r: np.full(50, 3.0),
}
TWO = {
    "clear": (lambda r: np.exp(r.normal(4, 0.2, 200)), 200),
    "near": (lambda r: np.exp(r.normal(3.3, 0.2, 500)), 500),
    "one": (lambda r: np.array([60.0]), 1),
    "many": (lambda r: np.exp(r.normal(4, 0.3, 5_000)), 5_000),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ONE)
def test_one_population_has_no_threshold(name: str, seed: int) -> None:
    assert split_norms(ONE[name](np.random.default_rng(seed))).threshold is None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TWO)
def test_two_populations_are_divided_between_them(name: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    make, count = TWO[name]
    low, high = ordinary(random), make(random)
    split = split_norms(np.concatenate([high, low]).reshape(-1, 1))
    assert split.threshold is not None and split.high is not None
    assert np.mean(low < split.threshold) > 0.999
    assert np.mean(high > split.threshold) > 0.98
    assert split.fraction == pytest.approx(count / (count + len(low)), rel=0.03)
    assert split.low == pytest.approx(np.median(low), rel=0.02)
    assert split.high == pytest.approx(np.median(high), rel=0.03)
