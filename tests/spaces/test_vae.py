"""The VAE as a space: its scale, its noise per sample, the way back, and what does not fit."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.rng import normal_per_sample, sample_keys
from dsr_jax.models.latent_normalization import LatentNormalization
from dsr_jax.models.vae import AutoencoderKL
from dsr_jax.sampling.images import to_uint8
from dsr_jax.spaces import VAE
from tests.programs import quick_programs
from tests.tiny_vae import CONFIG, vae_params

SPACE = VAE(AutoencoderKL(CONFIG), image_size=8)
IMAGES = np.random.default_rng(0).uniform(size=(4, 8, 8, 3)).astype(np.float32)
VARIABLES = SPACE.make_variables(vae_params())


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests share their programs."""
    with quick_programs(tmp_path_factory.mktemp("programs")):
        yield


def encode(images: Any = IMAGES, keys: Any = None, space: VAE = SPACE) -> np.ndarray:
    return np.asarray(jax.jit(space.encode)(VARIABLES, images, keys))


def keys(*indices: int) -> Any:
    return sample_keys(jax.random.key(7), np.array(indices, np.uint32))


def test_latents_are_scaled_means_or_samples_of_the_posterior() -> None:
    assert SPACE.latent_shape == (4, 4, 4)
    posterior = jax.jit(SPACE.posterior)(VARIABLES, IMAGES)
    np.testing.assert_allclose(encode(), posterior.mean * 0.18215, atol=1e-5)
    given = keys(0, 1, 2, 3)
    drawn = posterior.mean + posterior.std * normal_per_sample(given, SPACE.latent_shape)
    np.testing.assert_allclose(encode(keys=given), drawn * 0.18215, atol=1e-5)


def test_shift_and_statistics_of_channels_are_taken_back() -> None:
    mean, std = (0.5, -1.0, 0.0, 2.0), (2.0, 1.0, 0.5, 4.0)
    for normalization, want in (
        (LatentNormalization(0.5, shift=0.1), lambda x: (x - 0.1) * 0.5),
        (LatentNormalization(1.0, mean=mean, std=std), lambda x: (x - mean) / np.array(std)),
    ):
        space = dataclasses.replace(SPACE, normalization=normalization)
        raw = jax.jit(SPACE.posterior)(VARIABLES, IMAGES).mean
        latents = encode(space=space)
        np.testing.assert_allclose(latents, want(np.asarray(raw)), atol=1e-5)
        images = jax.jit(space.decode)(VARIABLES, latents)
        np.testing.assert_allclose(images, jax.jit(SPACE.decode)(VARIABLES, encode()), atol=1e-4)


def test_noise_belongs_to_the_sample_whatever_its_batch() -> None:
    together = encode(keys=keys(0, 1, 2, 3))
    np.testing.assert_allclose(together[2:3], encode(IMAGES[2:3], keys(2)), atol=1e-5)
    assert np.abs(together - encode()).max() > 1e-3


def test_decoding_takes_the_scale_back_and_leaves_clipping_to_uint8() -> None:
    latents = encode()
    # So that pixels leave [0, 1].
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 9 if "conv_out" in str(path) else x, vae_params()
    )
    images = jax.jit(SPACE.decode)({"vae": params}, latents)
    decode = functools.partial(SPACE.network.apply, method="decode")
    raw = jax.jit(decode)({"params": params}, latents / 0.18215)
    np.testing.assert_allclose(images * 2 - 1, raw, atol=1e-4)
    assert (np.asarray(images) < 0).any() and (np.asarray(images) > 1).any()
    want = np.clip(127.5 * np.asarray(raw, np.float64) + 128, 0, 255).astype(np.uint8)
    got = np.asarray(to_uint8(images, "sit"))
    # The way over [0, 1] rounds, so that a number next to a whole one may land on its other side.
    assert (got != want).mean() < 0.01 and np.abs(got.astype(int) - want).max() <= 1


def test_latents_are_not_differentiated() -> None:
    loss = lambda params: SPACE.encode({"vae": params}, IMAGES).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(vae_params())
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 7}, "image_size=7 .*divides sides by 2"),
        ({"image_size": 0}, "image_size=0"),
        ({"normalization": LatentNormalization(0.0)}, "config.space.scale=0.0"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SPACE, **change)
