"""The encoder: what it returns and refuses, and what registers change."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.trees import count_params
from dsr_jax.models.intervention import Intervention
from dsr_jax.models.precision import Precision
from dsr_jax.models.variants import ENCODERS
from dsr_jax.models.vit import ViT, ViTConfig

SIZES = {"hidden_size": 16, "depth": 3, "num_heads": 2, "mlp_dim": 24}


def tiny(name: str) -> ViTConfig:
    preset = ENCODERS[name]
    return ViTConfig(**{**preset, **SIZES, "image_size": 4 * preset["patch_size"]})


def setup(config: ViTConfig) -> tuple[Any, np.ndarray]:
    side = 4 * config.patch_size
    pixels = np.random.default_rng(0).standard_normal((2, side, side, 3)).astype(np.float32)
    params = nn.unbox(jax.jit(ViT(config).init)(jax.random.key(0), pixels))["params"]
    return params, pixels


@pytest.mark.parametrize("name", ENCODERS)
def test_returns_patches_alone_with_and_without_registers(name: str) -> None:
    config = tiny(name)
    params, pixels = setup(config)
    mask = np.zeros((config.depth, config.mlp_dim), bool)
    mask[1, 3] = True
    for intervention in (None, Intervention(mask=mask, num_registers=2)):
        out = ViT(config).apply({"params": params}, pixels, intervention)
        assert out.tokens.shape == out.pre_norm.shape == (2, 16, config.hidden_size)
        norms = np.linalg.norm(out.tokens, axis=-1)
        np.testing.assert_allclose(norms, np.sqrt(config.hidden_size), rtol=1e-2)


def test_presets_have_the_published_sizes() -> None:
    """A ViT-B/16 has 85.8 million parameters; SigLIP's So400M vision tower about 412."""
    for name, millions in {
        "siglip2-base-patch16-256": 85.8,
        "siglip2-so400m-patch14-224": 412.4,
        "dinov2-base": 86.6,
        "dinov2-with-registers-base": 86.6,
        "dinov3-vitb16": 85.7,
        "mae-base": 85.8,
    }.items():
        config = ViTConfig(**ENCODERS[name])
        pixels = jnp.zeros((1, config.patch_size, config.patch_size, 3))
        abstract = nn.unbox(jax.eval_shape(ViT(config).init, jax.random.key(0), pixels))
        assert count_params(abstract) / 1e6 == pytest.approx(millions, abs=0.06), name


def test_an_empty_mask_leaves_the_patches_attend_to_a_zero_token() -> None:
    """Registers are ordinary tokens; with several the softmax sees several."""
    config = tiny("siglip2-base-patch16-256")
    params, pixels = setup(config)
    mask = np.zeros((config.depth, config.mlp_dim), bool)
    outs = [
        ViT(config).apply({"params": params}, pixels, Intervention(mask=mask, num_registers=n))
        for n in (1, 4)
    ]
    assert float(jnp.abs(outs[0].tokens - outs[1].tokens).max()) > 1e-4


def test_the_mask_acts_from_its_block_on() -> None:
    config = tiny("siglip2-base-patch16-256")
    params, pixels = setup(config)

    def layers(mask: np.ndarray) -> np.ndarray:
        _, kept = ViT(config).apply(
            {"params": params}, pixels, Intervention(mask=mask), mutable=["intermediates"]
        )
        return np.asarray(kept["intermediates"]["blocks"]["block_out"][0])

    none = np.zeros((config.depth, config.mlp_dim), bool)
    some = none.copy()
    some[1, 5] = True
    a, b = layers(none), layers(some)
    np.testing.assert_array_equal(a[0], b[0])
    assert np.abs(a[1] - b[1]).max() > 1e-4
    # Row 0 is spared in the block itself, and sees the change one block later.
    np.testing.assert_array_equal(a[1][:, 0], b[1][:, 0])
    assert np.abs(a[2][:, 0] - b[2][:, 0]).max() > 0


def test_bfloat16_stays_near_float32() -> None:
    config = tiny("dinov3-vitb16")
    params, pixels = setup(config)
    wide = ViT(config).apply({"params": params}, pixels)
    narrow = ViT(config, precision=Precision("bfloat16")).apply({"params": params}, pixels)
    assert narrow.tokens.dtype == jnp.float32
    difference = np.abs(narrow.tokens - wide.tokens).max() / np.abs(wide.tokens).max()
    assert 0 < difference < 0.05


def test_what_does_not_fit_is_named() -> None:
    config = tiny("siglip2-base-patch16-256")
    params, pixels = setup(config)
    apply = ViT(config).apply
    with pytest.raises(ConfigError, match="do not divide into patches of 16"):
        apply({"params": params}, pixels[:, :60])
    with pytest.raises(ConfigError, match="images of shape"):
        apply({"params": params}, pixels[..., :1])
    with pytest.raises(ConfigError, match="found for this very encoder"):
        apply({"params": params}, pixels, Intervention(mask=np.zeros((2, 24), bool)))
    with pytest.raises(ConfigError, match="num_heads=3"):
        dataclasses.replace(config, num_heads=3)
    with pytest.raises(ConfigError, match="activation='relu'"):
        dataclasses.replace(config, activation="relu")
