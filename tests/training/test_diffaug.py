"""The discriminator's augmentation: what each random number does, and to its own sample only."""

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.training.diffaug import NUM_UNIFORMS, augment, change_colors, cut_out, translate

MIDDLE = jnp.full((1, NUM_UNIFORMS), 0.5)


def images(count: int = 1, size: int = 16) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (count, size, size, 3))


def uniforms(count: int) -> jax.Array:
    return jax.random.uniform(jax.random.key(1), (count, NUM_UNIFORMS))


def test_uniforms_in_the_middle_change_nothing() -> None:
    np.testing.assert_allclose(augment(images(), MIDDLE), images(), atol=1e-6)


def test_the_largest_translation_is_an_eighth_and_pads_with_zeros() -> None:
    x, largest = images(), jnp.array([0.999])
    moved = translate(x, largest, jnp.array([0.0]))
    np.testing.assert_array_equal(moved[:, :14, 2:], x[:, 2:, :14])
    assert not moved[:, 14:].any() and not moved[:, :, :2].any()


def test_colors() -> None:
    x, half = images(), jnp.array([0.5])
    brighter = change_colors(x, jnp.array([0.75]), half, half)
    np.testing.assert_allclose(brighter, x + 0.25, atol=1e-5)
    gray = change_colors(x, half, jnp.array([0.0]), half)
    np.testing.assert_allclose(gray, np.repeat(x.mean(-1, keepdims=True), 3, -1), atol=1e-5)
    flat = change_colors(x, half, half, jnp.array([0.0]))
    np.testing.assert_allclose(np.std(flat) / np.std(x), 0.5, rtol=1e-4)
    np.testing.assert_allclose(flat.mean(), x.mean(), atol=1e-6)


def test_holes_have_their_size_and_lie_within_the_image() -> None:
    ones = jnp.ones((64, 20, 20, 1))
    uniforms = jax.random.uniform(jax.random.key(2), (2, 64))
    holes = np.asarray(cut_out(ones, *uniforms, share=0.25))[..., 0] == 0
    assert set(np.unique(holes.any(axis=2).sum(axis=1))) <= {3, 4, 5}
    middle = np.asarray(cut_out(ones[:1], jnp.array([0.5]), jnp.array([0.5]), 0.25))
    assert (middle == 0).sum() == 25
    corner = np.asarray(cut_out(ones[:1], jnp.array([0.0]), jnp.array([0.0]), 0.25))
    assert (corner == 0).sum() == 9 and not corner[0, 0, 0].any()


def test_a_sample_depends_on_its_own_uniforms() -> None:
    x, u = images(3), uniforms(3)
    whole = augment(x, u, 0.2)
    for row in range(3):
        alone = augment(x[row : row + 1], u[row : row + 1], 0.2)
        np.testing.assert_allclose(alone[0], whole[row], atol=1e-6)


def test_gradients_reach_what_is_left() -> None:
    down, right = jnp.array([0.999]), jnp.array([0.5])
    gradient = jax.grad(lambda x: translate(x, down, right).sum())(images())
    np.testing.assert_array_equal(gradient[0, :2], np.zeros((2, 16, 3)))
    np.testing.assert_array_equal(gradient[0, 2:], np.ones((14, 16, 3)))
