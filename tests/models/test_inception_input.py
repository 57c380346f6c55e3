"""Inception's input by hand; golden cases hold it to TensorFlow's."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.models.inception_input import prepare, resize_bilinear


def test_pixels_of_the_resize_by_hand():
    images = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1) * 10
    found = np.asarray(resize_bilinear(images, 4))[0, ..., 0]
    # Source places are 0, 0.5, 1 and 1.5; beyond the last pixel there is nothing to mix in.
    np.testing.assert_array_equal(found[:, 0], [0, 10, 20, 20])
    np.testing.assert_array_equal(found[0], [0, 5, 10, 10])
    centered = np.asarray(resize_bilinear(images, 4, centered=True))[0, ..., 0]
    np.testing.assert_array_equal(centered[0], [0, 2.5, 7.5, 10])


def test_shrinking_does_not_smooth():
    stripes = np.zeros((1, 598, 598, 3), np.uint8)
    stripes[:, :, ::2] = 255
    assert (np.asarray(resize_bilinear(stripes)) == 255).all()


def test_range_and_grayscale():
    levels = np.array([0, 128, 255], np.uint8).reshape(3, 1, 1, 1)
    given = np.asarray(prepare(jnp.asarray(levels)))
    assert given.shape == (3, 299, 299, 3)
    assert given[:, 0, 0, 0].tolist() == [-1, 0, 0.9921875]
    other = np.asarray(prepare(jnp.asarray(levels), "pytorch_fid"))
    assert other[[0, 2], 0, 0, 0].tolist() == [-1, 1]
    with pytest.raises(ConfigError, match="unknown resize 'bicubic'"):
        prepare(jnp.asarray(levels), "bicubic")
