"""Decoding without an encoder: the images of the whole space, with its folder absent."""

import shutil

import jax
import numpy as np
import pytest

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.core.errors import ConfigError
from tests.tiny_rae import save_rae


def test_images_are_those_of_the_whole_space(tmp_path) -> None:
    config = configs.load("configs/digits.py", save_rae(tmp_path))
    whole, variables = build.make_space(config)
    (tmp_path / "encoder" / "params.safetensors").unlink()
    space, decoding = build.make_decoding_space(config)
    assert "encoder" not in decoding and space.latent_shape == whole.latent_shape
    latents = jax.random.normal(jax.random.key(0), (2, *space.latent_shape))
    np.testing.assert_array_equal(space.decode(decoding, latents), whole.decode(variables, latents))


def test_an_absent_encoder_is_recognized_by_name_or_rejected(tmp_path) -> None:
    config = configs.load("configs/digits.py", save_rae(tmp_path))
    shutil.rmtree(tmp_path / "encoder")
    with pytest.raises(ConfigError, match="encoder=.*does not exist, and 0 known encoders"):
        build.make_decoding_space(config)
    config.space.update(encoder="converted/dinov2-base", decoder="", statistics="", image_size=0)
    space, _ = build.make_decoding_space(config)
    assert space.latent_shape == (16, 16, 768)
