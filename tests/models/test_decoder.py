"""RAE's decoder: sizes, tokens in and images out, what it refuses, and its start."""

import dataclasses
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.trees import count_params
from dsr_jax.models.decoder import DecoderConfig, ViTDecoder
from dsr_jax.models.precision import Precision
from dsr_jax.models.resample import resample
from dsr_jax.models.variants import DECODERS
from tests.programs import quick_programs
from tests.tiny_rae import DECODER, decoder_params


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests share their programs."""
    with quick_programs(tmp_path_factory.mktemp("programs")):
        yield


def tokens(grid: int = DECODER.grid) -> np.ndarray:
    shape = (2, grid**2, DECODER.latent_channels)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def apply(given: np.ndarray, drop_first: bool = False, **options) -> jax.Array:
    decoder = ViTDecoder(DECODER, **options)
    return decoder.apply({"params": decoder_params()}, given, drop_first).image


@pytest.mark.parametrize(("channels", "millions"), [(768, 415.35), (1152, 415.80)])
def test_the_released_decoder_has_the_published_size(channels: int, millions: float) -> None:
    config = DecoderConfig(channels, grid=16, patch_size=16, **DECODERS["ViTXL"])
    given = jnp.zeros((1, 256, channels))
    abstract = nn.unbox(jax.eval_shape(ViTDecoder(config).init, jax.random.key(0), given))
    assert count_params(abstract) / 1e6 == pytest.approx(millions, abs=0.005)
    assert config.image_size == 256


def test_a_patch_of_the_image_is_a_row_of_the_logits() -> None:
    out = ViTDecoder(DECODER).apply({"params": decoder_params()}, tokens())
    assert out.image.shape == (2, 20, 20, 3) and out.logits.shape == (2, 16, 75)
    patch = out.image[:, 5:10, 10:15]  # second row of patches, third column
    np.testing.assert_array_equal(patch, out.logits[:, 6].reshape(2, 5, 5, 3))


def test_another_grid_is_resampled_behind_the_first_projection() -> None:
    """The projection is affine and the weights of resampling sum to 1, so before is the same."""
    given = tokens(6)
    grid = resample(given.reshape(2, 6, 6, -1), DECODER.grid, DECODER.grid, "bilinear")
    want = apply(grid.reshape(2, DECODER.grid**2, -1))
    np.testing.assert_allclose(apply(given), want, atol=1e-5)


def test_a_class_token_is_left_out() -> None:
    given = tokens()
    with_class = np.concatenate([np.ones_like(given[:, :1]), given], axis=1)
    np.testing.assert_array_equal(apply(with_class, True), apply(given))


def test_bfloat16_and_remat_stay_near_and_equal() -> None:
    given = tokens()
    want = apply(given)
    near = apply(given, precision=Precision("bfloat16"))
    assert near.dtype == jnp.float32
    assert 0 < np.abs(near - want).max() < 0.05 * np.abs(want).max()

    def gradient(remat: str) -> jax.Array:
        return jax.jit(jax.grad(lambda x: jnp.sum(apply(x, remat=remat) ** 2)))(given)

    np.testing.assert_allclose(gradient("full"), gradient("none"), rtol=1e-4, atol=1e-4)


def test_a_new_decoder_is_initialized_like_the_original() -> None:
    """Uniform up to 1 / sqrt(inputs), biases too; sines and cosines; a class token of zeros."""
    config = dataclasses.replace(DECODER, hidden_size=64, mlp_dim=100)
    params = nn.unbox(jax.jit(ViTDecoder(config).init)(jax.random.key(0), tokens()))["params"]
    attention, mlp = params["blocks"]["attn"], params["blocks"]["mlp"]
    for layer, inputs in (
        (params["embed"], 16),
        (params["pred"], 64),
        (attention["q"], 64),
        (attention["out"], 64),
        (mlp["fc1"], 64),
        (mlp["fc2"], 100),
    ):
        for leaf in (layer["kernel"], layer["bias"]):
            bound = inputs**-0.5
            assert 0.8 * bound < np.abs(leaf).max() <= bound
    assert not params["cls_token"].any() and not params["pos_embed"][:, 0].any()
    # Channel 0 is the sine of the column, channel D / 2 that of the row.
    table = params["pos_embed"][0, 1:].reshape(4, 4, 64)
    np.testing.assert_allclose(table[2, :, 0], np.sin(np.arange(4)), atol=1e-6)
    np.testing.assert_allclose(table[:, 3, 32], np.sin(np.arange(4)), atol=1e-6)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match="12 channels for a decoder of 16"):
        apply(tokens()[..., :12])
    with pytest.raises(ConfigError, match="17 latent tokens do not form a square"):
        apply(np.zeros((1, 17, 16), np.float32))
    with pytest.raises(ConfigError, match="num_heads=5"):
        _ = dataclasses.replace(DECODER, num_heads=5).blocks
