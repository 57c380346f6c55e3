"""Token weights mask outliers, average to one and take no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.diffusion.token_weights import TokenWeights

NORMS = jnp.array([[10.0, 12.0], [11.0, 200.0]]).reshape(1, 2, 2, 1)
T = jnp.array([0.7])


def test_outliers_get_no_loss_and_the_rest_shares_it() -> None:
    weights = TokenWeights(outlier_norm=100.0)(NORMS, T)
    np.testing.assert_allclose(weights.reshape(4), [4 / 3, 4 / 3, 4 / 3, 0], rtol=1e-6)


def test_no_setting_is_no_weight() -> None:
    np.testing.assert_array_equal(TokenWeights()(NORMS, T), 1.0)


def test_equal_norms_are_weighted_alike() -> None:
    weights = TokenWeights(norm_shift=True, logit_normal=True, time_shift=6.9)
    even = weights(jnp.full((2, 4, 4, 1), 27.7), jnp.array([0.2, 0.8]))
    np.testing.assert_allclose(even, 1.0, rtol=1e-5)
    assert np.ptp(weights(NORMS, T)) > 0.1


def test_no_gradient_passes() -> None:
    weights = TokenWeights(norm_shift=True, time_shift=6.9)
    np.testing.assert_array_equal(jax.grad(lambda n: weights(n, T).max())(NORMS), 0.0)


def test_halves_of_a_setting_are_refused() -> None:
    with pytest.raises(ConfigError, match="norm_shift"):
        TokenWeights(logit_normal=True)
    with pytest.raises(ConfigError, match="outlier_norm=-1"):
        TokenWeights(outlier_norm=-1)
