"""The autoencoder's switches, noise per sample, statistics, and errors about mismatches."""

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.rng import sample_keys
from dsr_jax.models.decoder import ViTDecoder
from dsr_jax.models.intervention import Intervention
from dsr_jax.models.vit import ViT
from dsr_jax.spaces.rae import RAE, Noise, add_noise, sample_noise
from tests.programs import quick_programs
from tests.tiny_rae import DECODER, ENCODER, decoder_params, encoder_params, statistics

SPACE = RAE(ViT(ENCODER), ViTDecoder(DECODER), image_size=16)
IMAGES = np.random.default_rng(0).uniform(size=(4, 16, 16, 3)).astype(np.float32)
MASK = np.zeros((ENCODER.depth, ENCODER.mlp_dim), bool)
MASK[0, 3] = True


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests share their programs."""
    with quick_programs(tmp_path_factory.mktemp("programs")):
        yield


def variables(**options: Any) -> dict[str, Any]:
    return SPACE.make_variables(encoder_params(), decoder_params(), **options)


def encode(space: RAE = SPACE, given: Any = None, images: Any = IMAGES, keys: Any = None) -> Any:
    return np.asarray(jax.jit(space.encode)(given or variables(), images, keys))


def keys(*indices: int) -> Any:
    return sample_keys(jax.random.key(7), np.array(indices, np.uint32))


def test_defaults_are_the_published_ones() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(RAE)}
    published = {"image_size": 224, "noise_tau": 0.8, "norm_scaled_noise": False}
    published |= {"post_stat_norm": False, "preln": False, "eps": 1e-5}
    assert published.items() <= fields.items()


def test_statistics_normalize_latents_and_decode_inverts_them() -> None:
    raw, normed = encode(), encode(given=variables(statistics=statistics()))
    mean, var = statistics()["mean"], statistics()["var"]
    np.testing.assert_allclose(normed, (raw - mean) / np.sqrt(var + 1e-5), atol=1e-5)
    images = SPACE.decode(variables(), raw)
    assert images.shape == (4, 20, 20, 3) and (images < 0).any()  # not clipped
    again = SPACE.decode(variables(statistics=statistics()), normed)
    np.testing.assert_allclose(again, images, atol=1e-4)


def test_latents_are_the_tokens_row_by_row() -> None:
    out = ViT(ENCODER).apply({"params": encoder_params()}, IMAGES * 2 - 1)
    np.testing.assert_allclose(encode().reshape(4, 16, 16), out.tokens, atol=1e-5)
    pre = encode(dataclasses.replace(SPACE, preln=True))
    np.testing.assert_allclose(pre.reshape(4, 16, 16), out.pre_norm, atol=1e-5)


def test_other_sizes_are_resized_to_the_encoder() -> None:
    images = np.full((2, 23, 9, 3), 0.75, np.float32)
    np.testing.assert_allclose(SPACE.normalize_images(images), 0.5, atol=1e-6)
    assert encode(images=images).shape == (2, *SPACE.latent_shape)


def test_noise_belongs_to_the_sample_whatever_its_batch() -> None:
    together = encode(keys=keys(0, 1, 2, 3))
    alone = encode(images=IMAGES[2:3], keys=keys(2))
    np.testing.assert_allclose(together[2:3], alone, atol=1e-5)
    added = together - encode()
    std = added.std(axis=(1, 2, 3))
    assert (std < 0.9).all() and np.ptp(std) > 0.05  # a level of its own for each sample
    assert len({row.tobytes() for row in added}) == 4


def test_there_is_no_noise_without_keys_or_without_tau() -> None:
    quiet = dataclasses.replace(SPACE, noise_tau=0.0)
    np.testing.assert_array_equal(encode(quiet, keys=keys(0, 1, 2, 3)), encode())


def test_levels_of_noise_are_uniform_up_to_tau() -> None:
    count = 2000
    many = jax.random.split(jax.random.key(0), count)
    noise = jax.jit(lambda given: sample_noise(given, (2, 2, 8)))(many)
    assert abs(float(noise.level.mean()) - 0.5) < 0.03 and float(noise.level.max()) < 1
    assert abs(float(noise.normal.std()) - 1) < 0.02
    correlation = np.corrcoef(noise.level, noise.normal[:, 0, 0, 0])[0, 1]
    assert abs(correlation) < 0.1


def test_scaled_noise_follows_the_lower_median_within_bounds() -> None:
    norms = np.array([[[1.0, 2.0], [40.0, 0.1]]], np.float32)  # lower median 1
    noise = Noise(np.array([0.5], np.float32), np.ones((1, 2, 2, 3), np.float32))
    added = add_noise(np.zeros((1, 2, 2, 3), np.float32), norms, noise, 2.0, True)
    np.testing.assert_allclose(added[0, ..., 0], [[1.0, 2.0], [5.0, 0.2]], rtol=1e-5)
    added = add_noise(np.zeros((1, 2, 2, 3), np.float32), norms, noise, 2.0, False)
    np.testing.assert_array_equal(added, np.ones((1, 2, 2, 3)))


def test_noise_after_statistics_is_not_divided_by_them() -> None:
    given = variables(statistics=statistics())
    four = keys(0, 1, 2, 3)
    clean = encode(given=given)
    before = encode(given=given, keys=four) - clean
    after = encode(dataclasses.replace(SPACE, post_stat_norm=True), given, keys=four) - clean
    np.testing.assert_allclose(before * np.sqrt(statistics()["var"] + 1e-5), after, atol=1e-4)


def test_registers_change_latents_and_warn_where_the_encoder_has_its_own() -> None:
    registers = Intervention(mask=MASK)
    assert np.abs(encode(given=variables(registers=registers)) - encode()).max() > 1e-4
    config = dataclasses.replace(ENCODER, num_registers=4, use_cls=True)
    space = RAE(ViT(config), image_size=16)
    with pytest.warns(UserWarning, match="was trained with 4 registers"):
        space.make_variables(encoder_params(config), registers=registers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        space.make_variables(encoder_params(config))


def test_what_does_not_fit_together_is_named() -> None:
    with pytest.raises(
        ConfigError, match="image_size=18 is not a multiple of the encoder's patches of 4"
    ):
        dataclasses.replace(SPACE, image_size=18)
    with pytest.raises(ConfigError, match="noise_tau=-1"):
        dataclasses.replace(SPACE, noise_tau=-1)
    with pytest.raises(ConfigError, match="latents of 12 channels, but the encoder's have 16"):
        RAE(ViT(ENCODER), ViTDecoder(dataclasses.replace(DECODER, latent_channels=12)), 16)
    wrong = {name: x[:2] for name, x in statistics().items()}
    with pytest.raises(ConfigError, match=r"statistics: mean has shape \(2, 4, 16\)"):
        variables(statistics=wrong)
    with pytest.raises(ConfigError, match="found for this very encoder"):
        variables(registers=Intervention(mask=MASK[:1]))
    with pytest.raises(ConfigError, match="has no decoder"):
        dataclasses.replace(SPACE, decoder=None).decode(variables(), encode())
