"""Dropout: fractions, scaling, sites, layers, and random bits per sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.models.dropout import ATTENTION_OUTPUT, MLP_HIDDEN, make_dropout, middle_half

KEYS = jax.vmap(jax.random.key)(jnp.arange(4))
ONES = jnp.ones((4, 50, 20))


def layer(index: int, keys: jax.Array = KEYS, rate: float = 0.3):
    """The dropout of one of three layers."""
    stack = make_dropout(keys, np.full(3, rate, np.float32))
    return jax.tree.map(lambda leaf: leaf[index], stack)


def test_the_rates_fraction_is_zero_and_the_mean_stays():
    dropped = layer(0)(ONES, MLP_HIDDEN)
    assert set(np.unique(dropped).round(5)) == {0.0, np.float32(1 / 0.7).round(5)}
    assert np.mean(dropped == 0) == pytest.approx(0.3, abs=0.03)
    assert dropped.mean() == pytest.approx(1, abs=0.05)


def test_rate_zero_changes_no_bit():
    x = jax.random.normal(jax.random.key(0), (4, 5, 6))
    np.testing.assert_array_equal(layer(1, rate=0.0)(x, MLP_HIDDEN), x)


def test_narrow_types_stay_narrow():
    assert layer(0)(ONES.astype(jnp.bfloat16), MLP_HIDDEN).dtype == jnp.bfloat16


def test_dropout_differs_by_sample_layer_and_position():
    one = layer(0)(ONES, MLP_HIDDEN)
    assert (one[0] != one[1]).any()
    assert (one != layer(1)(ONES, MLP_HIDDEN)).any()
    assert (one != layer(0)(ONES, ATTENTION_OUTPUT)).any()


def test_dropout_of_a_sample_does_not_depend_on_its_batch():
    whole = layer(2)(ONES, MLP_HIDDEN)
    np.testing.assert_array_equal(layer(2, KEYS[1:3])(ONES[:2], MLP_HIDDEN), whole[1:3])


def test_gradients_pass_where_values_do():
    dropped, gradient = (
        layer(0)(ONES, MLP_HIDDEN),
        jax.grad(lambda x: layer(0)(x, MLP_HIDDEN).sum())(ONES),
    )
    np.testing.assert_array_equal(gradient, dropped)


@pytest.mark.parametrize(
    ("depth", "dropping"), [(12, (3, 9)), (32, (8, 24)), (24, (6, 18)), (7, (1, 3)), (3, (0, 0))]
)
def test_the_middle_half_is_rounded_as_the_original_rounds_it(depth, dropping):
    rates = middle_half(depth, 0.2)
    want = [0.2 if dropping[0] <= i < dropping[1] else 0.0 for i in range(depth)]
    np.testing.assert_allclose(rates, want, rtol=1e-6)


def test_splitting_a_stack_keeps_the_dropout_of_its_layers():
    stack = make_dropout(KEYS, middle_half(8, 0.5))
    tail = stack.layers(3, 8)
    np.testing.assert_array_equal(tail.rate, stack.rate[3:])
    got = jax.tree.map(lambda leaf: leaf[1], tail)(ONES, MLP_HIDDEN)
    want = jax.tree.map(lambda leaf: leaf[4], stack)(ONES, MLP_HIDDEN)
    np.testing.assert_array_equal(got, want)
