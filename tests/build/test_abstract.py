"""Shapes of what a config names, with and without the files."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.build.abstract import abstract_batch, abstract_space, encoder_preset
from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import PyTree

ROOT = Path(__file__).parents[2]
RAE = ("--config.space.name=rae", "--config.eval.classifier=", "--config.data.channels=3")
ABSENT = (
    *(*RAE, "--config.data.image_size=256", "--config.space.encoder=nowhere/siglip2-base"),
    *("--config.space.decoder=nowhere/decoder", "--config.space.statistics=nowhere/statistics"),
    "--config.space.neurons=nowhere/neurons.json",
)


def load(*overrides: str) -> configs.ConfigDict:
    """The digits config, changed."""
    return configs.load(str(ROOT / "configs" / "digits.py"), overrides)


def shapes(tree: PyTree) -> PyTree:
    """Shapes and dtypes of all leaves."""
    return jax.tree.map(lambda leaf: (tuple(leaf.shape), jnp.dtype(leaf.dtype)), tree)


def test_shapes_are_those_of_the_arrays() -> None:
    config = load(*RAE, "--config.data.image_size=32", "--config.space.encoder=random:tiny")
    space, variables = abstract_space(config)
    real_space, real = build.make_space(config)
    assert space == real_space and shapes(variables) == shapes(real)


def test_absent_files_are_logged_and_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    space, variables = abstract_space(load(*ABSENT))
    assert space.latent_shape == (16, 16, 768)
    assert set(variables) == {"encoder", "decoder", "statistics", "registers"}
    assert variables["statistics"]["mean"].shape == (16, 16, 768)
    said = capsys.readouterr().err
    for name in ("siglip2-base-patch16-256", "ViTXL", "nowhere/statistics", "nowhere/neurons"):
        assert name in said
    latents = jax.ShapeDtypeStruct((2, *space.latent_shape), jnp.float32)
    assert jax.eval_shape(space.decode, variables, latents).shape == (2, 256, 256, 3)


def test_cached_latents_need_no_encoder() -> None:
    config = load(
        *RAE, "--config.space.encoder=nowhere/dinov2-base", "--config.data.latents=nowhere"
    )
    space, variables = abstract_space(config)
    batch = abstract_batch(config, space)
    assert not variables
    assert (batch["image"].shape, batch["image"].dtype) == ((128, 16, 16, 768), jnp.bfloat16)
    latents = jax.eval_shape(space.encode, variables, batch["image"])
    assert latents.shape == batch["image"].shape


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("converted/siglip2-so400m", "siglip2-so400m-patch14-224"),
        ("dinov2-base", "dinov2-base"),
        ("a/dinov3", "dinov3-vitb16"),
    ],
)
def test_folders_are_called_like_their_encoders(name: str, preset: str) -> None:
    assert encoder_preset(name) == preset


@pytest.mark.parametrize("name", ["converted/siglip2", "converted/clip"])
def test_a_name_of_no_or_several_encoders_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="random:NAME"):
        encoder_preset(name)
