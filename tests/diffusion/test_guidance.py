"""Guidance in one batched evaluation equals its definition in two."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.diffusion import guidance

COLLECTIVES = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter")
NULL = 5
X = jax.random.normal(jax.random.key(0), (3, 2, 2, 4))
T = jnp.array([0.1, 0.5, 0.9])
Y = jnp.array([0, 3, 1])


def network(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.sin(x * (1 + y.reshape(-1, 1, 1, 1))) + t.reshape(-1, 1, 1, 1)


def strength(scale, *interval, **settings):
    return guidance.strength_in(scale, *interval, **settings)


def test_guidance_extrapolates_and_its_interval_is_closed_and_per_sample() -> None:
    conditional, null = network(X, T, Y), network(X, T, jnp.full(3, NULL))
    full = null + 2.5 * (conditional - null)
    got = guidance.classifier_free(network, strength(2.5), NULL)(X, T, Y)
    np.testing.assert_allclose(got, full, rtol=1e-5, atol=1e-5)
    got = guidance.classifier_free(network, strength(2.5, (0.5, 0.9)), NULL)(X, T, Y)
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
    got = guidance.classifier_free(network, strength(2.5, interval, open_ends=True), NULL)(
        x, times, labels
    )
    moved = np.abs(got - conditional).max(axis=(1, 2, 3)) > 1e-3
    np.testing.assert_array_equal(np.flatnonzero(moved), guided)


def test_some_channels_may_stay_conditional() -> None:
    conditional = network(X, T, Y)
    got = guidance.classifier_free(network, strength(2.5), NULL, channels=3)(X, T, Y)
    np.testing.assert_allclose(got[..., 3:], conditional[..., 3:], rtol=1e-6)
    assert np.abs(got[..., :3] - conditional[..., :3]).max() > 0.1


def test_autoguidance_leaves_the_weaker_model_behind() -> None:
    weak = lambda x, t, y: 0.5 * network(x, t, y)  # noqa: E731
    got = guidance.autoguidance(network, weak, strength(1.4, (0.0, 0.5)))(X, T, Y)
    strong = network(X, T, Y)
    np.testing.assert_allclose(got[:2], (0.5 + 1.4 * 0.5) * strong[:2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[2], strong[2], rtol=1e-5, atol=1e-6)


def test_labels_are_dropped_by_their_own_number() -> None:
    dropped = guidance.drop_labels(Y, jnp.array([0.05, 0.1, 0.99]), 0.1, NULL)
    np.testing.assert_array_equal(dropped, [NULL, 3, 1])


@pytest.mark.parametrize("interval", [(0.6, 0.6), (0.9, 0.1), (0.9,), (0.1, 0.5, 0.9)])
def test_invalid_intervals_are_rejected(interval: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"sample.interval=\(0.*\n.*LOW,HIGH"):
        guidance.strength_in(2.0, interval)


def test_guidance_moves_no_rows_between_devices() -> None:
    """Both predictions of a sample are computed where the sample is."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    guided = guidance.classifier_free(network, strength(2.5, (0.1, 0.9)), NULL)
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=split)
        for shape, dtype in (((16, 2, 2, 4), jnp.float32), ((16,), jnp.float32), ((16,), jnp.int32))
    ]
    program = jax.jit(guided, out_shardings=split).lower(*shapes).compile().as_text()
    assert not COLLECTIVES.findall(program)

    def halves(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        doubled = [jnp.concatenate([part, part]) for part in (x, t, y)]
        return network(*doubled)[: len(x)]

    program = jax.jit(halves, out_shardings=split).lower(*shapes).compile().as_text()
    assert COLLECTIVES.findall(program), "the check sees what a batch of two halves costs"
