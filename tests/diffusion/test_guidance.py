"""Guidance in one batched evaluation equals its definition in two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.diffusion import guidance

NULL = 5
X = jax.random.normal(jax.random.key(0), (3, 2, 2, 4))
T = jnp.array([0.1, 0.5, 0.9])
Y = jnp.array([0, 3, 1])


def network(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.sin(x * (1 + y.reshape(-1, 1, 1, 1))) + t.reshape(-1, 1, 1, 1)


def test_scale_one_is_the_network_itself() -> None:
    assert guidance.classifier_free(network, 1.0, NULL) is network
    assert guidance.autoguidance(network, network, 1.0) is network


def test_guidance_extrapolates_and_its_interval_is_closed_and_per_sample() -> None:
    conditional, null = network(X, T, Y), network(X, T, jnp.full(3, NULL))
    full = null + 2.5 * (conditional - null)
    got = guidance.classifier_free(network, 2.5, NULL)(X, T, Y)
    np.testing.assert_allclose(got, full, rtol=1e-5, atol=1e-5)
    got = guidance.classifier_free(network, 2.5, NULL, interval=(0.5, 0.9))(X, T, Y)
    np.testing.assert_allclose(got[0], conditional[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[1:], full[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("interval", "guided"),
    [((0.1, 0.9), [1]), ((0.1, 1.0), [1, 2, 3]), ((0.0, 0.5), [0]), ((0.2, 0.9), [1])],
)
def test_an_open_interval_ends_before_its_ends(
    interval: tuple[float, float], guided: list[int]
) -> None:
    """Also where 1 - t was rounded; but pure noise is never left out."""
    times = 1 - jnp.array([0.9, 0.5, 0.1, 0.0])  # In float32, 1 - 0.9 is not 0.1.
    x, labels = jnp.concatenate([X, X[:1]]), jnp.array([0, 3, 1, 2])
    conditional = network(x, times, labels)
    got = guidance.classifier_free(network, 2.5, NULL, interval, open_ends=True)(x, times, labels)
    moved = np.abs(got - conditional).max(axis=(1, 2, 3)) > 1e-3
    np.testing.assert_array_equal(np.flatnonzero(moved), guided)


def test_some_channels_may_stay_conditional() -> None:
    conditional = network(X, T, Y)
    got = guidance.classifier_free(network, 2.5, NULL, channels=3)(X, T, Y)
    np.testing.assert_allclose(got[..., 3:], conditional[..., 3:], rtol=1e-6)
    assert np.abs(got[..., :3] - conditional[..., :3]).max() > 0.1


def test_autoguidance_leaves_the_weaker_model_behind() -> None:
    weak = lambda x, t, y: 0.5 * network(x, t, y)  # noqa: E731
    got = guidance.autoguidance(network, weak, 1.4, (0.0, 0.5))(X, T, Y)
    strong = network(X, T, Y)
    np.testing.assert_allclose(got[:2], (0.5 + 1.4 * 0.5) * strong[:2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[2], strong[2], rtol=1e-5, atol=1e-6)


def test_official_intervals_switch_off_by_the_first_sample() -> None:
    guided = guidance.classifier_free_off(network, 2.5, NULL, [(0.0, 0.3)])
    np.testing.assert_allclose(guided(X, T, Y), network(X, T, Y), rtol=1e-5, atol=1e-5)
    later = guided(X, T + 0.3, Y)
    assert np.abs(later - network(X, T + 0.3, Y)).max() > 0.1


def test_labels_are_dropped_by_their_own_draw() -> None:
    dropped = guidance.drop_labels(Y, jnp.array([0.05, 0.1, 0.99]), 0.1, NULL)
    np.testing.assert_array_equal(dropped, [NULL, 3, 1])


def test_empty_intervals_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(0.6, 0.6\)"):
        guidance.classifier_free(network, 2.0, NULL, (0.6, 0.6))
    with pytest.raises(ConfigError, match="interval"):
        guidance.autoguidance(network, network, 2.0, (0.9, 0.1))
