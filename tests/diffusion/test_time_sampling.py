"""Training times have the distribution that they are named for."""

import math
import statistics

import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.diffusion.time_sampling import (
    TimeSampler,
    make_time_sampler,
    shift_time,
    time_support,
)

U = (jnp.arange(4096) + 0.5) / 4096


def test_logit_normal_quantiles_after_the_shift() -> None:
    shift = math.sqrt(48)
    t = make_time_sampler("logit-normal_0_1", "linear", "data", shift)(U)
    assert float(jnp.median(t)) == pytest.approx(0.874, abs=1e-3)
    normal = statistics.NormalDist(math.log(shift), 1)
    for share in (0.1, 0.5, 0.9):
        expected = 1 / (1 + math.exp(-normal.inv_cdf(share)))
        assert float(jnp.quantile(t, share)) == pytest.approx(expected, abs=1e-3)


def test_truncation_keeps_the_shape_inside() -> None:
    whole = TimeSampler("logit-normal", 0.3, 0.7)(U)
    cut = TimeSampler("logit-normal", 0.3, 0.7, t_min=0.2, t_max=0.6)(U)
    inside = np.asarray(whole)[(whole >= 0.2) & (whole <= 0.6)]
    assert cut.min() >= 0.2 and cut.max() <= 0.6
    shares = [0.25, 0.5, 0.75]
    np.testing.assert_allclose(np.quantile(cut, shares), np.quantile(inside, shares), atol=2e-3)


def test_velocity_stops_before_pure_noise() -> None:
    assert time_support("linear", "velocity") == (0.0, 0.999)
    assert float(make_time_sampler("uniform", "linear", "velocity")(U).max()) < 0.999
    assert time_support("linear", "noise") == (1e-3, 1 - 1e-3)


def test_a_named_range_replaces_the_predictions_own() -> None:
    whole = make_time_sampler("uniform", "linear", "velocity", time_range=(0.0, 1.0))
    assert (whole.t_min, whole.t_max) == (0.0, 1.0)
    for times in ((0.5,), (0.7, 0.2), (0.0, 1.5)):
        with pytest.raises(ConfigError, match=r"config.objective.time_range=\("):
            make_time_sampler("uniform", "linear", "velocity", time_range=times)


def test_shift_multiplies_odds() -> None:
    t = jnp.array([0.2, 0.5])
    shifted = shift_time(t, 3.0)
    np.testing.assert_allclose(shifted / (1 - shifted), 3 * t / (1 - t), rtol=1e-5)


@pytest.mark.parametrize("name", ["normal_0_1", "logit-normal_0", "logit-normal_a_b", "uniform_1"])
def test_unreadable_distributions_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=name.split("_")[0]):
        make_time_sampler(name, "linear", "data")


def test_nonsense_is_refused() -> None:
    with pytest.raises(ConfigError, match="time_shift=0.5"):
        TimeSampler(shift=0.5)
    with pytest.raises(ConfigError, match="0.9"):
        TimeSampler(t_min=0.9, t_max=0.1)
