"""Pixel space is a scaling that inverts itself."""

import jax.numpy as jnp
import numpy as np

from dsr_jax.spaces import PixelSpace


def test_round_trip_and_clipping() -> None:
    space = PixelSpace(image_size=4, channels=3)
    images = np.random.default_rng(0).uniform(size=(2, 4, 4, 3)).astype(np.float32)
    latents = space.encode({}, jnp.asarray(images))
    assert space.latent_shape == images.shape[1:]
    assert latents.min() >= -1 and latents.max() <= 1 and latents.min() < -0.5
    np.testing.assert_allclose(space.decode({}, latents), images, atol=1e-6)
    np.testing.assert_array_equal(space.decode({}, jnp.full((1, 4, 4, 3), 9.0)), 1.0)
