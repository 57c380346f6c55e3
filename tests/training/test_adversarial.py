"""Adversarial losses by their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.training.adversarial import (
    accuracy,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    quantize,
)

REAL, FAKE = jnp.array([2.0, 0.5, -1.0]), jnp.array([-3.0, 0.5, 0.0])


def test_losses() -> None:
    hinge = 0.5 * (np.mean([0, 0.5, 2]) + np.mean([0, 1.5, 1]))
    assert discriminator_loss("hinge", REAL, FAKE) == pytest.approx(hinge)
    vanilla = 0.5 * (np.log1p(np.exp(-REAL)).mean() + np.log1p(np.exp(FAKE)).mean())
    assert discriminator_loss("vanilla", REAL, FAKE) == pytest.approx(vanilla)
    assert generator_loss(FAKE) == pytest.approx(2.5 / 3)
    assert accuracy(REAL, FAKE) == pytest.approx(1 / 3)
    with pytest.raises(ConfigError, match="config.gan.loss='wasserstein'.*\n.*hinge"):
        discriminator_loss("wasserstein", REAL, FAKE)


def test_the_adaptive_weight_is_limited_and_carries_no_gradient() -> None:
    a, b = jnp.full((2, 2), 3.0), jnp.full((2, 2), 0.5)
    assert adaptive_weight(a, b, 1e4) == pytest.approx(6, rel=1e-5)
    assert adaptive_weight(a, 0 * b, 1e4) == 1e4
    assert not jax.grad(lambda x: adaptive_weight(x, b, 1e4))(a).any()


def test_quantized_images_have_256_levels() -> None:
    levels = np.unique(quantize(jnp.linspace(-1.2, 1.2, 5000)))
    np.testing.assert_allclose(levels, np.arange(256) / 127.5 - 1, atol=1e-6)
