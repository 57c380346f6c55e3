"""The SD-VAE: sizes, bounds of its posterior, padding of convolutions, precision and errors."""

import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.trees import count_params
from dsr_jax.models.kernels import attend
from dsr_jax.models.precision import Precision
from dsr_jax.models.vae import AutoencoderKL, Conv, GroupNorm, Posterior, VAEConfig
from tests.programs import quick_programs
from tests.tiny_vae import CONFIG, vae_params

IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 8, 6, 3)).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests share their programs."""
    with quick_programs(tmp_path_factory.mktemp("programs")):
        yield


def run(network: AutoencoderKL, variables: Any, *given: Any, **options: Any) -> Any:
    return jax.jit(functools.partial(network.apply, **options))(variables, *given)


def test_released_sizes() -> None:
    """Of sd-vae-ft-ema, spec denoiser 9.5."""
    network = AutoencoderKL()
    shapes = nn.unbox(jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))))
    assert count_params(shapes["params"]) == 83_653_863
    assert len(jax.tree.leaves(shapes)) == 248
    assert network.config.factor == 8


def test_latents_and_images_have_their_shapes() -> None:
    network, variables = AutoencoderKL(CONFIG), {"params": vae_params()}
    posterior = run(network, variables, IMAGES, method="encode")
    assert posterior.mean.shape == posterior.std.shape == (2, 4, 3, 4)
    images = run(network, variables, posterior.mean, method="decode")
    assert images.shape == IMAGES.shape
    np.testing.assert_allclose(run(network, variables, IMAGES), images, atol=1e-5)


def test_variance_is_bounded_and_noise_scaled_by_it() -> None:
    params = vae_params()
    bias = np.array(params["quant_conv"]["bias"])
    bias[4:] += 1000 * np.array([-1, 1, -1, 1], np.float32)
    params = params | {"quant_conv": {**params["quant_conv"], "bias": bias}}
    posterior = run(AutoencoderKL(CONFIG), {"params": params}, IMAGES, method="encode")
    for channel, bound in enumerate((-30, 20, -30, 20)):
        assert (np.asarray(posterior.log_variance[..., channel]) == bound).all()
    shape = posterior.mean.shape
    drawn = Posterior(jnp.full(shape, 3.0), jnp.full(shape, np.log(4.0))).sample(jnp.ones(shape))
    np.testing.assert_allclose(drawn, 5, rtol=1e-6)


def test_halving_pads_behind_only() -> None:
    """The first output sees the first three rows, the last one's third row is padding."""
    conv = Conv(1, stride=2, padding=((0, 1), (0, 1)))
    params = {"kernel": np.ones((3, 3, 1, 1), np.float32), "bias": np.zeros(1, np.float32)}
    x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    got = conv.apply({"params": params}, x)[0, ..., 0]
    padded = np.pad(x[0, ..., 0], (0, 1))
    want = [[padded[i : i + 3, j : j + 3].sum() for j in (0, 2)] for i in (0, 2)]
    np.testing.assert_array_equal(got, want)


def test_groups_are_adjacent_channels() -> None:
    x = np.random.default_rng(1).normal(size=(2, 3, 5, 6)).astype(np.float32)
    params = {"scale": np.ones(6, np.float32), "bias": np.arange(6, dtype=np.float32)}
    got = np.asarray(GroupNorm(2).apply({"params": params}, x))
    for first in (0, 3):
        part = x[..., first : first + 3]
        mean = part.mean(axis=(1, 2, 3), keepdims=True)
        want = (part - mean) / np.sqrt(part.var(axis=(1, 2, 3), keepdims=True) + 1e-6)
        np.testing.assert_allclose(
            got[..., first : first + 3], want + np.arange(first, first + 3), atol=1e-5
        )


def test_bfloat16_stays_near_float32() -> None:
    params = {"params": vae_params()}
    wide = run(AutoencoderKL(CONFIG), params, IMAGES)
    narrow = run(AutoencoderKL(CONFIG, precision=Precision("bfloat16")), params, IMAGES)
    assert narrow.dtype == jnp.float32
    error = np.abs(narrow - wide).max() / np.abs(wide).max()
    assert 1e-6 < error < 0.1


def test_the_wide_head_is_not_given_to_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would refuse it; the kernel that is chosen instead runs here, too."""
    q, k, v = (
        jax.random.normal(key, (1, 4, 1, 512), jnp.bfloat16)
        for key in jax.random.split(jax.random.key(0), 3)
    )
    want = attend(q, k, v)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_allclose(
        np.asarray(attend(q, k, v), np.float32), np.asarray(want, np.float32), atol=0.05
    )


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(8, 12\) channels do not divide into 5 groups"):
        VAEConfig(widths=(8, 12), num_groups=5)
    with pytest.raises(ConfigError, match="images of 8 x 5 .*divides sides by 2"):
        AutoencoderKL(CONFIG).apply({"params": vae_params()}, IMAGES[:, :, :5], method="encode")
