"""LPIPS: zero for equal images, a number where features vanish, weights that count."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.models.lpips import LPIPS
from tests.training.toy_training import FAST_COMPILE

NETWORK = LPIPS((8, 8, 8, 8, 8))


@pytest.fixture(scope="module")
def params() -> Any:
    images = jnp.zeros((1, 16, 16, 3))
    return nn.unbox(jax.jit(NETWORK.init)(jax.random.key(0), images, images))["params"]


def pairs(seed: int) -> jax.Array:
    """Two batches of three images."""
    return jax.random.uniform(jax.random.key(seed), (2, 3, 16, 16, 3), minval=-1)


def network(params: Any, a: Any, b: Any) -> Any:
    return NETWORK.apply({"params": params}, a, b)


distances: Any = jax.jit(network, compiler_options=FAST_COMPILE)


def test_equal_images_are_at_distance_zero_and_others_symmetric(params: Any) -> None:
    a, b = pairs(1)
    np.testing.assert_allclose(distances(params, a, a), np.zeros(3), atol=1e-12)
    there, back = distances(params, a, b), distances(params, b, a)
    assert there.shape == (3,) and (there > 0).all()
    np.testing.assert_allclose(there, back, rtol=1e-6)


def test_each_pair_is_compared_alone(params: Any) -> None:
    a, b = pairs(2)
    swapped = distances(params, a[::-1], b[::-1])
    np.testing.assert_allclose(swapped[::-1], distances(params, a, b), rtol=1e-5)


def test_the_weights_scale_the_slices(params: Any) -> None:
    a, b = pairs(3)
    whole = float(distances(params, a, b)[0])
    parts = []
    for number in range(1, 6):
        weight = f"weight{number}"
        without = {**params, weight: jnp.zeros_like(params[weight])}
        parts.append(whole - float(distances(without, a, b)[0]))
    assert min(parts) > 0
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-5)


def test_the_gradient_is_finite_where_all_features_are_zero(params: Any) -> None:
    silent = {
        name: {**layer, "bias": layer["bias"] - 100} if "conv" in name else layer
        for name, layer in params.items()
    }
    a, b = pairs(4)
    gradient = jax.jit(
        jax.grad(lambda x: network(silent, a, x).sum()), compiler_options=FAST_COMPILE
    )(b)
    np.testing.assert_array_equal(gradient, np.zeros_like(b))
