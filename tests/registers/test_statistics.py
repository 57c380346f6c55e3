"""Statistics of tokens against NumPy on dumped activations, and on planted outliers."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.prompts import IMAGE_SLOT
from dsr_jax.models.conditioning import TextCondition
from dsr_jax.models.denoiser import Denoiser
from dsr_jax.models.dit import LightningDiT
from dsr_jax.models.dit_dh import DiTDH
from dsr_jax.models.intervention import Intervention
from dsr_jax.models.jit import JiT
from dsr_jax.models.language import LanguageModel
from dsr_jax.models.sit import SiT
from dsr_jax.models.text_to_image import TextToImage
from dsr_jax.models.transformer import DiffusionTransformer
from dsr_jax.models.vit import ViT, ViTConfig
from dsr_jax.registers.outliers import split_norms
from dsr_jax.registers.planting import plant_register_neurons
from dsr_jax.registers.statistics import (
    STATISTICS,
    TokenMeasures,
    effective_rank,
    measure_denoiser,
    measure_encoder,
    outlier_mask,
    received_attention,
    summarize,
)
from tests.tiny_denoisers import random_params

SIZES: dict[str, Any] = {
    "input_size": 4,
    "in_channels": 3,
    "num_classes": 5,
    "hidden_size": 16,
    "depth": 3,
    "num_heads": 2,
    "num_registers": 4,
    "register_start": 1,
    "precision": DiffusionTransformer.precision,
}
MODELS = {
    "dit": LightningDiT(**SIZES, attn_kv_bias=True, remat="full"),
    "dit_without_registers": LightningDiT(**{**SIZES, "num_registers": 0}),
    "ditdh": DiTDH(
        **SIZES, decoder_hidden_size=24, decoder_depth=2, decoder_num_heads=2, remat="dots"
    ),
    "sit": SiT(**{**SIZES, "input_size": 8}),
    "jit": JiT(
        **{**SIZES, "register_start": 1},
        patch_size=1,
        bottleneck_dim=4,
        num_class_tokens=3,
        class_token_start=2,
    ),
}
# Rows of the registers and of the first patch, by stack, written down by hand.
ROWS = {
    "dit": {"blocks_pre": ([], 0), "blocks_reg": ([0, 1, 2, 3], 4)},
    "dit_without_registers": {"blocks": ([], 0)},
    "ditdh": {
        "enc_blocks_pre": ([], 0),
        "enc_blocks_reg": ([0, 1, 2, 3], 4),
        "dec_blocks": ([0, 1, 2, 3], 4),
    },
    "sit": {"blocks_pre": ([], 0), "blocks_reg": ([0, 1, 2, 3], 4)},
    "jit": {
        "blocks_pre": ([], 0),
        "blocks_reg": ([0, 1, 2, 3], 4),
        "blocks_ctx": ([3, 4, 5, 6], 7),
    },
}


def reference(sown: Any, rows: dict[str, tuple[list[int], int]], side: int) -> TokenMeasures:
    """Measures dumped activations in float64."""
    measures = []
    for stack, (registers, first) in rows.items():
        outputs = np.asarray(sown[stack]["block_out"][0], np.float64)
        queries, keys = (np.asarray(x, np.float64) for x in sown[stack]["attn"]["qk"][0])
        for x, q, k in zip(outputs, queries, keys, strict=True):
            patches = x[:, first : first + side**2]
            extra = k.shape[1] - x.shape[1]
            scores = np.einsum("bshk,bmhk->bhsm", q, k) / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            received = weights.mean((1, 2))[:, extra:]
            measures.append(
                (
                    np.linalg.norm(patches, axis=-1),
                    np.stack([neighbors(image.reshape(side, side, -1)) for image in patches]),
                    np.array([rank(image) for image in patches]),
                    received[:, first : first + side**2],
                    received[:, registers].sum(-1),
                )
            )
    return TokenMeasures(*map(np.stack, zip(*measures, strict=True)))


def neighbors(tokens: np.ndarray) -> np.ndarray:
    side, found = len(tokens), []
    for y, x in np.ndindex(side, side):
        here = tokens[y, x]
        values = [
            here @ tokens[v, u] / np.linalg.norm(here) / np.linalg.norm(tokens[v, u])
            for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
            if 0 <= v < side and 0 <= u < side
        ]
        found.append(np.mean(values))
    return np.array(found)


def rank(tokens: np.ndarray) -> float:
    values = np.linalg.svd(tokens - tokens.mean(0), compute_uv=False) ** 2
    return float(values.sum() ** 2 / (values**2).sum())


def inputs(model: DiffusionTransformer, batch: int = 3) -> tuple[jax.Array, ...]:
    key = jax.random.key(1)
    x = jax.random.normal(key, (batch, model.input_size, model.input_size, model.in_channels))
    return x, jnp.linspace(0.2, 0.9, batch), jnp.arange(batch) % model.num_classes


def check(name: str) -> None:
    model = MODELS[name]
    params, (x, t, labels) = random_params(model), inputs(model)

    @jax.jit
    def both(params: Any) -> Any:
        measures = measure_denoiser(model, params, x, t, labels)
        own = 1 - t if model.reversed_time else t
        _, sown = model.apply({"params": params}, x, own, labels, mutable=["intermediates"])
        return measures, sown["intermediates"]

    measures, sown = both(params)
    want = reference(sown, ROWS[name], model.grid)
    assert measures.norms.shape[0] == model.depth + (2 if name == "ditdh" else 0)
    for field, got, right in zip(TokenMeasures._fields, measures, want, strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-5, err_msg=f"{name} {field}")
    if model.num_registers:
        assert measures.to_registers[-1].max() > 0.01
    assert float(measures.to_registers[0].max()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS))
def test_measures_of_every_denoiser_equal_numpy(name: str) -> None:
    check(name)


@pytest.mark.slow
def test_a_network_of_text_is_measured_at_its_denoiser() -> None:
    text = LightningDiT(**{**SIZES, "depth": 2}, condition_width=8)
    language = LanguageModel(11, 8, 1, 2, 1, 16)
    model = TextToImage(
        input_size=4, in_channels=3, num_classes=0, language=language, denoiser=text, text_length=20
    )
    x, t, _ = inputs(text)
    tokens = jnp.full((3, 20), IMAGE_SLOT).at[:, :3].set(jnp.arange(9).reshape(3, 3))
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), x, t, tokens))["params"]
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: (0.3 * random.standard_normal(leaf.shape)).astype(np.float32), shapes
    )

    @jax.jit
    def both(params: Any) -> Any:
        states = model.apply({"params": params}, tokens, method="read")
        condition = TextCondition(states.rows, jnp.zeros(3, bool))
        alone = measure_denoiser(text, params["denoiser"], x, t, condition)
        return measure_denoiser(model, params, x, t, tokens), alone

    measures, alone = both(params)
    assert measures.norms.shape == (2, 3, 16)
    assert measures.to_registers[-1].max() > 0.01
    for field, got, want in zip(TokenMeasures._fields, measures, alone, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6, err_msg=field)


def test_a_network_without_blocks_is_refused() -> None:
    network = Denoiser(input_size=4, in_channels=1, num_classes=2)
    with pytest.raises(ConfigError, match="log.outliers=0"):
        measure_denoiser(network, {}, jnp.zeros(1), jnp.zeros(1))


@pytest.mark.slow
def test_programs_that_ask_for_nothing_hold_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["dit"]
    params, arguments = random_params(model), inputs(model)

    def lowered() -> str:
        # A new function each time, since JAX keeps the traces of old ones.
        loss = lambda p: jnp.sum(model.apply({"params": p}, *arguments))  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(params).as_text()

    plain = lowered()
    monkeypatch.setattr(nn.Module, "sow", lambda *args, **kwargs: False)
    jax.clear_caches()
    assert lowered() == plain


def test_groups_of_queries_change_nothing() -> None:
    keys = jax.random.split(jax.random.key(0))
    q, k = (jax.random.normal(key, (2, 7, 2, 4)) for key in keys)
    whole = received_attention(q, k)
    np.testing.assert_allclose(
        received_attention(q, k, max_weights=3 * 2 * 2 * 7), whole, rtol=1e-5
    )
    np.testing.assert_allclose(whole.sum(-1), 1, rtol=1e-5)


def test_effective_rank_counts_equal_directions() -> None:
    tokens = np.zeros((2, 6, 8))
    tokens[0, :, :3] = np.repeat(np.eye(3), 2, axis=0) - 1 / 3  # Two equal directions, centered.
    np.testing.assert_allclose(effective_rank(jnp.asarray(tokens)), [2, 0], atol=1e-5)


def test_summaries_equal_numpy() -> None:
    random = np.random.default_rng(0)
    norms = random.normal(10, 1, (3, 4, 25))
    norms[1, 0, 3] = norms[1, 2, 7] = 90
    received = random.uniform(size=norms.shape) / 50
    measures = TokenMeasures(
        norms, random.normal(size=norms.shape), np.ones((3, 4)), received, np.full((3, 4), 0.25)
    )
    found = summarize(measures)
    assert set(found) == {*STATISTICS, "threshold"}
    assert np.isnan(found["threshold"][[0, 2]]).all()
    assert found["threshold"][1] == split_norms(norms[1]).threshold
    np.testing.assert_allclose(found["outlier_share"], [0, 0.02, 0])
    want = (received[1, 0, 3] + received[1, 2, 7]) / 4
    np.testing.assert_allclose(found["outlier_attention"], [0, want, 0])
    np.testing.assert_allclose(found["register_attention"], 0.25)
    np.testing.assert_allclose(found["norm_p98"][0], np.quantile(norms[0], 0.98))
    centered = norms[2] - norms[2].mean()
    np.testing.assert_allclose(
        found["norm_kurtosis"][2], (centered**4).mean() / (centered**2).mean() ** 2
    )
    assert (summarize(measures, threshold=0.0)["outlier_share"] == 1).all()
    given = summarize(measures, threshold=11.0)
    np.testing.assert_allclose(given["outlier_share"], (norms > 11).mean((1, 2)))


CONFIG = ViTConfig(
    family="siglip",
    image_size=32,
    patch_size=4,
    hidden_size=32,
    depth=4,
    num_heads=2,
    mlp_dim=64,
    activation="gelu_tanh",
)


@pytest.fixture(scope="module")
def encoder() -> tuple[ViT, Any, np.ndarray]:
    """A random encoder, and images with one unusual patch each."""
    random = np.random.default_rng(0)
    pixels = random.normal(0, 0.1, (6, 32, 32, 3)).astype(np.float32)
    pattern = np.sign(random.standard_normal((4, 4, 3))).astype(np.float32)
    for image, place in zip(pixels, random.permutation(63)[:6] + 1, strict=True):
        y, x = 4 * (place // 8), 4 * (place % 8)
        image[y : y + 4, x : x + 4] = pattern
    model = ViT(CONFIG)
    params = nn.unbox(model.init(jax.random.key(0), jnp.asarray(pixels[:1])))["params"]
    return model, jax.tree.map(np.asarray, params), pixels


@pytest.mark.slow
def test_planted_outliers_are_found_where_they_are(encoder: tuple[ViT, Any, np.ndarray]) -> None:
    model, params, pixels = encoder
    planted = plant_register_neurons(
        model, params, pixels, {1: [3, 9], 2: [5]}, fraction=(0.01, 0.03)
    )
    assert planted.outliers.sum() == len(pixels)
    measures = jax.jit(functools.partial(measure_encoder, model))(planted.params, pixels)
    found = outlier_mask(measures.norms, summarize(measures)["threshold"])
    np.testing.assert_array_equal(found[-1], planted.outliers)
    assert not found[0].any(), "the first block has no planted units"
    mask = np.zeros((CONFIG.depth, CONFIG.mlp_dim), bool)
    mask[1, [3, 9]] = mask[2, 5] = True
    cured = jax.jit(lambda p, x: measure_encoder(model, p, x, Intervention(mask=mask)))(
        planted.params, pixels
    )
    assert not outlier_mask(cured.norms, summarize(cured)["threshold"]).any()
    assert cured.to_registers[0].min() > 0, "the test-time register takes part in attention"
    assert float(measures.to_registers.max()) == 0


@pytest.mark.slow
def test_measures_of_an_encoder_equal_numpy(encoder: tuple[ViT, Any, np.ndarray]) -> None:
    _, _, pixels = encoder
    config = ViTConfig(
        **{**CONFIG.__dict__, "family": "dinov2", "use_cls": True, "num_registers": 2}
    )
    model = ViT(config)
    params = nn.unbox(model.init(jax.random.key(0), jnp.asarray(pixels[:1])))["params"]
    mask = np.zeros((config.depth, config.mlp_dim), bool)
    mask[1, 3] = True
    registers = Intervention(mask=mask)

    @jax.jit
    def both(params: Any) -> Any:
        _, sown = model.apply({"params": params}, pixels, registers, mutable=["intermediates"])
        return measure_encoder(model, params, pixels, registers), sown["intermediates"]

    measures, sown = both(params)
    # Class token, two trained registers, 64 patches, one test-time register.
    want = reference(sown, {"blocks": ([1, 2, 67], 3)}, 8)
    for field, got, right in zip(TokenMeasures._fields, measures, want, strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-5, err_msg=field)


@pytest.mark.slow
def test_a_loud_position_of_a_denoiser_is_found() -> None:
    model = MODELS["dit_without_registers"]
    params, (x, _, _) = random_params(model), inputs(model)
    params["pos_embed"][0, 6] *= 3000
    # One time and label, since random modulations differ as much as the outlier does.
    t, labels = jnp.full(3, 0.5), jnp.ones(3, jnp.int32)
    measures = jax.jit(functools.partial(measure_denoiser, model))(params, x, t, labels)
    found = outlier_mask(measures.norms, summarize(measures)["threshold"])
    assert found[:, :, 6].all()
    assert found.sum() == found[:, :, 6].size
