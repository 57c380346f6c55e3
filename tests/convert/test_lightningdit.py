"""LightningDiT's table: exact round trips under all flags, sizes read off files, strictness."""

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dsr_jax.convert.lightningdit import infer_model, lightningdit_rules, rope_buffers
from dsr_jax.convert.rules import flax_to_torch, torch_to_flax
from dsr_jax.core.errors import ConfigError, ConversionError
from dsr_jax.core.trees import flatten_names
from dsr_jax.models.dit import LightningDiT
from tests.convert.official_states import make_state
from tests.requirements import require

GOLDEN = Path(__file__).parent.parent / "golden"
SIZES = dict(input_size=4, in_channels=3, hidden_size=16, depth=3, num_heads=2, num_classes=5)
CASES = {
    "released": {},
    "registers_from_the_start": dict(num_registers=4, register_start=0),
    "registers_from_block_2": dict(num_registers=9, register_start=2),
    "qk_rmsnorm": dict(use_qknorm=True),
    "layernorm": dict(use_rmsnorm=False),
    "qk_layernorm": dict(use_rmsnorm=False, use_qknorm=True, num_registers=4, register_start=1),
    "gelu": dict(use_swiglu=False, mlp_ratio=3.0),
    "attention_bias": dict(attn_kv_bias=True),
    "patch_2": dict(patch_size=2, learn_sigma=True),
    "no_final_norm": dict(final_norm=False),
    "no_rope": dict(use_rope=False, mlp_ratio=2.0),
}


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_exact(name):
    model = LightningDiT(**{**SIZES, **CASES[name]})
    rules, state = lightningdit_rules(model), make_state(model)
    params = torch_to_flax(state, rules)
    assert {path: x.shape for path, x in flatten_names(params).items()} == dict(rules.shapes)
    back = flax_to_torch(params, rules) | rope_buffers(model)
    assert set(back) == set(state)
    for key, value in state.items():
        assert back[key].dtype == value.dtype
        np.testing.assert_array_equal(back[key], value, err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_model_is_read_off_the_file(name):
    model = LightningDiT(**{**SIZES, **CASES[name]})
    heads = 0 if model.use_rope or model.use_qknorm else model.num_heads
    start = model.register_start if model.num_registers else -1
    assert infer_model(make_state(model), num_heads=heads, register_start=start) == model


@pytest.mark.parametrize(
    ("case", "start"),
    [
        ("lightningdit_base", -1),
        ("lightningdit_reg", 1),
        ("lightningdit_altflags", -1),
        ("lightningdit_attnbias", 1),
    ],
)
def test_original_state_dicts_come_back(case, start):
    state = load_file(GOLDEN / f"denoiser_{case}" / "weights.safetensors")
    model = infer_model(state, register_start=start)
    rules = lightningdit_rules(model)
    back = flax_to_torch(torch_to_flax(state, rules), rules)
    constants = rope_buffers(model)
    assert set(back) | set(constants) == set(state)
    for name, value in back.items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)
    require("torch", "torch")  # whose bits the tables have
    for name, value in constants.items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)


@pytest.mark.parametrize("case", ["72_16_0", "72_16_36", "64_16_36", "128_16_36"])
def test_rope_tables_of_released_sizes_have_the_originals_bits(case):
    require("torch", "torch")
    head_dim, grid, registers = map(int, case.split("_"))
    sizes = dict(input_size=grid, hidden_size=2 * head_dim, num_registers=registers)
    model = LightningDiT(**{**SIZES, **sizes, "register_start": 1})
    name = "feat_rope_incontext" if registers else "feat_rope"
    tables = rope_buffers(model)
    with np.load(GOLDEN / "denoiser_tables" / "io.npz") as io:
        for part in ("cos", "sin"):
            got = tables[f"{name}.freqs_{part}"][io[f"rope_{case}_rows"]]
            np.testing.assert_array_equal(got, io[f"rope_{case}_{part}"])


def test_rope_tables_without_torch_are_one_unit_off_at_most(monkeypatch):
    model = LightningDiT(**SIZES)
    with_torch = rope_buffers(model)
    monkeypatch.setitem(sys.modules, "torch", None)
    for name, table in rope_buffers(model).items():
        np.testing.assert_allclose(table, with_torch[name], rtol=0, atol=2e-7)


def test_gate_and_heads_are_stored_where_the_model_reads_them():
    model = LightningDiT(**SIZES)
    state = make_state(model)
    block = torch_to_flax(state, lightningdit_rules(model))["blocks"]
    gate, value = np.split(state["blocks.1.mlp.w12.weight"], 2)
    np.testing.assert_array_equal(block["mlp"]["w12"]["kernel"][1, :, 0], gate.T)
    np.testing.assert_array_equal(block["mlp"]["w12"]["kernel"][1, :, 1], value.T)
    query, key, _ = np.split(state["blocks.2.attn.qkv.weight"], 3)
    np.testing.assert_array_equal(block["attn"]["qkv"]["kernel"][2, :, 0, 1], query[8:].T)
    np.testing.assert_array_equal(block["attn"]["qkv"]["kernel"][2, :, 1, 0], key[:8].T)
    np.testing.assert_array_equal(
        block["attn"]["proj"]["kernel"][0, 1], state["blocks.0.attn.proj.weight"][:, 8:].T
    )


def changed(state, name, value):
    return {key: x for key, x in {**state, name: value}.items() if x is not None}


@pytest.mark.parametrize(
    ("key", "value", "pattern"),
    [
        ("blocks.1.norm2.weight", None, r"missing .*\n +blocks\.1\.norm2\.weight"),
        ("pos_embed", None, r"missing .*\n +pos_embed"),
        ("blocks.0.attn.q_norm.weight", np.ones(8), r"not known .*\n +blocks\.0\.attn\.q_norm"),
        ("register_tokens", np.ones((1, 4, 16)), r"not known .*\n +register_tokens"),
        (
            "blocks.2.attn.qkv.weight",
            np.ones((48, 8)),
            r"blocks\.2\.attn\.qkv\.weight is \[48, 8\], the model's .* needs \[48, 16\]",
        ),
        (
            "y_embedder.embedding_table.weight",
            np.ones((5, 16)),
            r"y_embedder\S+ is \[5, 16\], the model's .* needs \[6, 16\]",
        ),
    ],
)
def test_every_key_must_fit(key, value, pattern):
    model = LightningDiT(**SIZES)
    with pytest.raises(ConversionError, match=pattern) as caught:
        torch_to_flax(changed(make_state(model), key, value), lightningdit_rules(model))
    assert "check that the file is of the model you named" in caught.value.remedy


def test_what_a_file_does_not_hold_is_asked_for():
    registers = LightningDiT(**SIZES, num_registers=4, register_start=1)
    with pytest.raises(ConversionError, match="4 registers .*\n.*--register-start"):
        infer_model(make_state(registers))
    without_rope = LightningDiT(**SIZES, use_rope=False)
    with pytest.raises(ConversionError, match="number of heads .*\n.*--num-heads"):
        infer_model(make_state(without_rope))


def test_other_models_are_refused():
    with pytest.raises(ConversionError, match=r"no LightningDiT: pos_embed.* begins with encoder"):
        infer_model({"encoder.weight": np.zeros(3)})
    state = make_state(LightningDiT(**SIZES))
    state["blocks.0.mlp.w3.weight"] = np.zeros((16, 4321))
    with pytest.raises(ConversionError, match="4321 hidden units"):
        infer_model(state)
    # Another feed-forward under the same outer names.
    del state["blocks.0.mlp.w3.weight"]
    with pytest.raises(ConversionError, match=r"blocks\.0\.mlp\.w3\.weight missing"):
        infer_model(state)


def test_impossible_sizes_are_named():
    state = make_state(LightningDiT(**SIZES, num_registers=4, register_start=1))
    model = infer_model(state, register_start=3)
    with pytest.raises(ConfigError, match=r"registers.start=3 .*0\.\.2"):
        lightningdit_rules(model)
    with pytest.raises(ConfigError, match="num_heads=3"):
        lightningdit_rules(infer_model(state, num_heads=3, register_start=1))
