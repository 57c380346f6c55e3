"""Inception's size and how its matmuls are computed; golden cases hold its values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.core.trees import count_params
from dsr_jax.models.inception import InceptionV3, convolve

KERNELS = ((1, 1), (3, 3), (1, 7))


def test_the_full_network_has_the_published_number_of_parameters():
    images = jnp.zeros((1, 299, 299, 3))
    shapes = jax.eval_shape(InceptionV3().init, jax.random.key(0), images)
    assert count_params(shapes["params"]) == 23_885_392
    features = jax.eval_shape(
        lambda p: InceptionV3().apply(p, images), jax.eval_shape(lambda: shapes)
    )
    assert [x.shape[1] for x in features] == [2048, 2023, 1008]


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        *((kernel, 1, padding) for kernel in KERNELS for padding in ("SAME", "VALID")),
        # The network has no 1x1 convolution that leaves out pixels.
        *((kernel, 2, "VALID") for kernel in KERNELS if kernel != (1, 1)),
    ],
)
@pytest.mark.parametrize("side", [8, 9])
def test_convolutions_by_the_definition(kernel, stride, padding, side):
    random = np.random.default_rng(0)
    x = random.standard_normal((2, side, side, 3)).astype(np.float32)
    weights = random.standard_normal((*kernel, 3, 4)).astype(np.float32)
    found = np.asarray(convolve(jnp.asarray(x), jnp.asarray(weights), stride, padding))
    around = [(k // 2,) * 2 if padding == "SAME" else (0, 0) for k in kernel]
    padded = np.pad(x, [(0, 0), *around, (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=(1, 2))
    want = np.einsum("bhwcij,ijcd->bhwd", windows[:, ::stride, ::stride], weights)
    assert found.shape == want.shape
    np.testing.assert_allclose(found, want, atol=1e-4)
