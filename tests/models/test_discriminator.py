"""The discriminator: spectral norm as pure state, heads on the right blocks, circular tokens."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.trees import flatten_names
from dsr_jax.models.discriminator import SPECTRAL, Discriminator, Heads, SpectralConv
from dsr_jax.models.variants import RANDOM_BACKBONES
from dsr_jax.models.vit import ViT, ViTConfig
from tests.requirements import require
from tests.training.toy_training import FAST_COMPILE

TINY = ViTConfig(**{**RANDOM_BACKBONES["tiny"], "depth": 3})
DISCRIMINATOR = Discriminator(ViT(TINY), (0, 1, 2, 5), Heads(3))


def unboxed(tree: Any) -> Any:
    return nn.unbox(tree)


@pytest.fixture(scope="module")
def arrays() -> tuple[Any, Any, Any]:
    """Backbone, heads and singular vectors."""
    backbone = fast(ViT(TINY).init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    heads, spectral = fast(DISCRIMINATOR.init)(jax.random.key(1))
    return unboxed(backbone), unboxed(heads), spectral


def fast(function: Any, **options: Any) -> Any:
    return jax.jit(function, compiler_options=FAST_COMPILE, **options)


logits_of = fast(DISCRIMINATOR, static_argnames="train")


def images(seed: int = 2, size: int = 16) -> jax.Array:
    return jax.random.uniform(jax.random.key(seed), (2, size, size, 3), minval=-1)


def test_the_kernel_is_divided_by_its_largest_singular_value() -> None:
    conv, x = SpectralConv(5, 3), jax.random.normal(jax.random.key(0), (2, 7, 4))
    variables = unboxed(conv.init(jax.random.key(1), x))
    train = fast(lambda variables: conv.apply(variables, x, mutable=[SPECTRAL])[1])
    for _ in range(60):
        after = train(variables)
        variables = {**variables, **after}
    kernel = np.asarray(variables["params"]["kernel"])
    largest = np.linalg.svd(kernel.transpose(2, 1, 0).reshape(5, 12))[1][0]
    plain = {"params": {**variables["params"], "kernel": kernel * 7}, SPECTRAL: after[SPECTRAL]}
    scaled = np.asarray(conv.apply(plain, x))
    np.testing.assert_allclose(scaled, conv.apply(variables, x), rtol=1e-4, atol=1e-5)
    wrapped = np.concatenate([x[:, -1:], x, x[:, :1]], axis=1)
    want = sum(wrapped[:, i : i + 7] @ kernel[i] for i in range(3)) / largest
    np.testing.assert_allclose(scaled, want + variables["params"]["bias"], rtol=1e-4, atol=1e-5)


def test_spectral_norm_is_torchs() -> None:
    torch = require("torch", "torch")
    layer = torch.nn.Conv1d(4, 5, 3, padding=1, padding_mode="circular")
    layer = torch.nn.utils.spectral_norm(layer)
    state = {name: x.detach().clone().numpy() for name, x in layer.state_dict().items()}
    x = np.random.default_rng(0).standard_normal((2, 7, 4)).astype(np.float32)
    variables = {
        "params": {"kernel": state["weight_orig"].transpose(2, 1, 0), "bias": state["bias"]},
        SPECTRAL: {"u": state["weight_u"], "v": state["weight_v"]},
    }
    got, after = SpectralConv(5, 3).apply(variables, x, mutable=[SPECTRAL])
    want = layer(torch.from_numpy(x.transpose(0, 2, 1))).detach().numpy()
    np.testing.assert_allclose(got, want.transpose(0, 2, 1), atol=1e-5)
    for name in "uv":
        moved = layer.state_dict()[f"weight_{name}"].numpy()
        np.testing.assert_allclose(after[SPECTRAL][name], moved, atol=1e-6)


def test_only_training_moves_the_singular_vectors(arrays: Any) -> None:
    backbone, heads, spectral = arrays
    logits, same = logits_of(backbone, heads, spectral, images(), train=False)
    jax.tree.map(np.testing.assert_array_equal, same, spectral)
    moved, after = logits_of(backbone, heads, spectral, images(), train=True)
    assert logits.shape == moved.shape == (2, 4 * 16)
    assert not np.allclose(logits, moved)
    for name, value in flatten_names(after).items():
        norms = np.linalg.norm(value, axis=-1)
        np.testing.assert_allclose(norms, np.ones_like(norms), rtol=1e-5, err_msg=name)


def test_features_are_the_last_block_then_the_key_blocks_that_exist(arrays: Any) -> None:
    features = fast(DISCRIMINATOR.features)(arrays[0], images(size=32))
    assert features.shape == (4, 2, 16, 32)
    np.testing.assert_array_equal(features[0], features[3])
    assert not np.allclose(features[1], features[2])


def test_each_map_has_a_head_of_its_own(arrays: Any) -> None:
    backbone, heads, spectral = arrays
    kernels = heads["heads"]["second"]["kernel"]
    assert kernels.shape == (4, 3, 32, 32) and not np.allclose(kernels[0], kernels[1])
    logits, _ = logits_of(backbone, heads, spectral, images(), train=False)
    out = heads["heads"]["out"]
    bias = out["bias"].at[2].add(1.0)
    changed = {"heads": {**heads["heads"], "out": {**out, "bias": bias}}}
    other, _ = logits_of(backbone, changed, spectral, images(), train=False)
    np.testing.assert_allclose(
        (other - logits).reshape(2, 4, 16).mean(axis=(0, 2)), [0, 0, 1, 0], atol=1e-5
    )


def test_grayscale_images_are_rejected(arrays: Any) -> None:
    with pytest.raises(ConfigError, match="RGB"):
        DISCRIMINATOR.features(arrays[0], jnp.zeros((1, 16, 16, 1)))
