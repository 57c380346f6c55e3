"""Conditions per token, registers' rules, slot insertion, and equality with class conditions."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.prompts import IGNORED, IMAGE_SLOT
from dsr_jax.models.conditioning import REGISTER_CONDITIONS, TextCondition, drop_text
from dsr_jax.models.dit import LightningDiT
from dsr_jax.models.language import LanguageModel
from dsr_jax.models.text_to_image import TextToImage, initial_inputs

SIZES = {
    "input_size": 2,
    "in_channels": 3,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 4,
    "num_registers": 4,
    "register_start": 1,
}
X, T = jax.random.normal(jax.random.key(1), (2, 2, 2, 3)), jnp.array([0.2, 0.7])


def _filled(model, *inputs):
    """Parameters without zeros, which would hide what they multiply."""
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))["params"]
    rng = np.random.default_rng(2)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes
    )


def _text(rows, dropped=False):
    return TextCondition(rows, jnp.full(len(rows), dropped))


def test_equal_rows_and_the_mean_rule_are_a_class_condition():
    by_class = LightningDiT(**SIZES)
    by_text = LightningDiT(**SIZES, condition_width=16, condition_silu=False)
    labels, row = jnp.array([1, 3]), jnp.zeros((2, 4, 16))
    params = _filled(by_class, X, T, labels)
    table = params["y_embedder"]["embedding_table"]["embedding"]
    shared = {**params, "y_embedder": {"dropout_embedding": jnp.zeros(16)}}
    time = dict(shared.pop("t_embedder"))
    time["W"] = jnp.asarray(_frequencies())
    want = by_class.apply({"params": {**params, "t_embedder": time}}, X, T, labels)
    del time["W"]
    text = _text(row + table[labels][:, None])
    got = by_text.apply({"params": {**shared, "t_embedder": time}}, X, T, text)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def _frequencies():
    from dsr_jax.models.conditioning import FOURIER_SEED
    from dsr_jax.models.embeddings import torch_normal

    return torch_normal(FOURIER_SEED, 256)


def test_the_frequencies_are_those_of_torch():
    torch = pytest.importorskip("torch")
    from dsr_jax.models.conditioning import FOURIER_SEED

    want = torch.randn(256, generator=torch.Generator().manual_seed(FOURIER_SEED)).numpy()
    np.testing.assert_allclose(_frequencies(), want, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rule", REGISTER_CONDITIONS)
def test_registers_have_no_order_and_their_rows_follow_the_rule(rule):
    model = LightningDiT(**SIZES, condition_width=8, register_condition=rule)
    count = 8 if rule == "query" else 4
    rows = jax.random.normal(jax.random.key(3), (2, count, 8))
    params = _filled(model, X, T, _text(rows))
    apply = jax.jit(lambda params, text: model.apply({"params": params}, X, T, text))
    want = apply(params, _text(rows))
    order = jnp.array([2, 0, 3, 1])
    swapped = {**params}
    for name in ("register_tokens", "register_pos_embed"):
        swapped[name] = params[name][:, order]
    permuted = rows
    if rule == "learned":
        table = {"registers": params["y_embedder"]["registers"][order]}
        swapped["y_embedder"] = params["y_embedder"] | table
    if rule == "query":
        permuted = jnp.concatenate([rows[:, :4], rows[:, 4:][:, order]], axis=1)
    np.testing.assert_allclose(apply(swapped, _text(permuted)), want, rtol=1e-4, atol=1e-4)
    dropped = apply(params, _text(rows, dropped=True))
    assert np.allclose(dropped, apply(params, drop_text(_text(2 * rows))), atol=1e-5)
    assert not np.allclose(dropped, want, atol=1e-2)


def _joint(**changes):
    language = LanguageModel(
        vocab_size=11, hidden_size=8, depth=1, num_heads=2, num_kv_heads=1, mlp_dim=8
    )
    denoiser = LightningDiT(**SIZES, condition_width=16)
    shared = {"input_size": 2, "in_channels": 3, "num_classes": 4, "text_length": 9}
    return TextToImage(**shared, language=language, denoiser=denoiser, **changes)


TOKENS = jnp.array(
    [[4, 5, 6, 1, *[IMAGE_SLOT] * 4, 2], [7, 1, *[IMAGE_SLOT] * 4, 2, 3, 0]], jnp.int32
)


@pytest.mark.slow
def test_slots_hold_queries_or_the_features_of_a_shown_image():
    model = _joint(understanding=True)
    params = {"params": _filled(model, *initial_inputs(model, (2, 2, 3)))}
    targets = jnp.full_like(TOKENS, IGNORED).at[0, 3].set(1)
    embedded = model.apply(params, TOKENS, targets, X, method="embed")
    queries = params["params"]["queries"]
    np.testing.assert_array_equal(embedded[0, 4:8], queries)
    assert not np.isclose(embedded[1, 2:6], queries).any()
    states = model.apply(params, TOKENS, targets, X, method="read")
    assert states.answers.tolist() == [True, False]
    # Queries see the words before them: another word changes the rows, one behind does not.
    rows = states.rows
    later = model.apply(params, TOKENS.at[0, 8].set(9), targets, X, method="read").rows
    earlier = model.apply(params, TOKENS.at[0, 0].set(9), targets, X, method="read").rows
    np.testing.assert_allclose(later, rows, rtol=1e-5, atol=1e-5)
    assert not np.allclose(earlier[0], rows[0], atol=1e-3)


def test_the_query_rule_takes_more_slots():
    model = _joint()
    assert model.num_slots == 4
    more = dataclasses.replace(model.denoiser, register_condition="query")
    assert dataclasses.replace(model, denoiser=more, parent=None).num_slots == 8


def test_errors_name_the_setting():
    with pytest.raises(ConfigError, match="connector='conv' is unknown"):
        _joint(connector="conv").check_sizes()
    with pytest.raises(ConfigError, match="max_length=4 does not hold"):
        dataclasses.replace(_joint(), text_length=4, parent=None).check_sizes()
    with pytest.raises(ConfigError, match="condition='sum' is unknown"):
        LightningDiT(**SIZES, register_condition="sum").check_sizes()
