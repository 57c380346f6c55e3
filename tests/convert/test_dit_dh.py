"""DiTDH's table: exact round trips under all flags, sizes read off files, strictness, commands."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from dsr_jax.convert.__main__ import main
from dsr_jax.convert.dit_dh import dit_dh_rules, infer_model, rope_buffers
from dsr_jax.convert.files import load_converted
from dsr_jax.convert.rules import flax_to_torch, torch_to_flax
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.trees import flatten_names
from dsr_jax.models.dit import LightningDiT
from dsr_jax.models.dit_dh import DiTDH
from tests.convert.official_states import make_state
from tests.requirements import require

GOLDEN = Path(__file__).parent.parent / "golden"
SIZES = dict(
    input_size=4,
    in_channels=3,
    hidden_size=16,
    depth=3,
    num_heads=2,
    num_classes=5,
    decoder_hidden_size=24,
    decoder_depth=2,
    decoder_num_heads=3,
)
SAME_WIDTH = dict(decoder_hidden_size=16, decoder_num_heads=4)
CASES = {
    "released": {},
    "registers_from_the_start": dict(num_registers=4, register_start=0),
    "registers_from_block_2": dict(num_registers=9, register_start=2),
    "one_width": SAME_WIDTH,
    "one_width_registers": dict(num_registers=4, register_start=1, **SAME_WIDTH),
    "no_positions": dict(use_pos_embed=False),
    "qk_rmsnorm": dict(use_qknorm=True),
    "layernorm": dict(use_rmsnorm=False),
    "qk_layernorm": dict(use_rmsnorm=False, use_qknorm=True, num_registers=4, register_start=1),
    "gelu": dict(use_swiglu=False, mlp_ratio=3.0),
    "patch_2": dict(patch_size=2, num_registers=4, register_start=1),
    "no_rope": dict(use_rope=False, mlp_ratio=2.0),
    "deep_head": dict(depth=1, decoder_depth=4),
}


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_exact(name):
    model = DiTDH(**{**SIZES, **CASES[name]})
    rules, state = dit_dh_rules(model), make_state(model)
    params = torch_to_flax(state, rules)
    assert {path: x.shape for path, x in flatten_names(params).items()} == dict(rules.shapes)
    back = flax_to_torch(params, rules) | rope_buffers(model)
    assert set(back) == set(state)
    for key, value in state.items():
        assert back[key].dtype == value.dtype
        np.testing.assert_array_equal(back[key], value, err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_model_is_read_off_the_file(name):
    model = DiTDH(**{**SIZES, **CASES[name]})
    given = {"register_start": model.register_start} if model.num_registers else {}
    if not (model.use_rope or model.use_qknorm):
        given |= {"num_heads": model.num_heads, "decoder_num_heads": model.decoder_num_heads}
    if model.decoder_hidden_size == model.hidden_size:
        given["decoder_depth"] = model.decoder_depth
    assert infer_model(make_state(model), **given) == model


@pytest.mark.parametrize(
    ("case", "given"),
    [("ddt_reg", {"register_start": 1}), ("ddt_altflags", {"decoder_depth": 1})],
)
def test_original_state_dicts_come_back(case, given):
    state = load_file(GOLDEN / f"denoiser_{case}" / "weights.safetensors")
    model = infer_model(state, **given)
    rules = dit_dh_rules(model)
    back = flax_to_torch(torch_to_flax(state, rules), rules)
    constants = rope_buffers(model)
    assert set(back) | set(constants) == set(state)
    for name, value in back.items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)
    require("torch", "torch")  # whose bits the tables have
    for name, value in constants.items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)


def test_blocks_are_assigned_to_the_encoder_or_the_head():
    model = DiTDH(**SIZES, num_registers=4, register_start=1)
    state = make_state(model)
    params = torch_to_flax(state, dit_dh_rules(model))
    layers = {0: ("enc_blocks_pre", 0), 2: ("enc_blocks_reg", 1), 3: ("dec_blocks", 0)}
    for number, (stack, layer) in layers.items():
        np.testing.assert_array_equal(
            params[stack]["mlp"]["w3"]["kernel"][layer], state[f"blocks.{number}.mlp.w3.weight"].T
        )
    np.testing.assert_array_equal(
        params["s_embedder"]["proj"]["kernel"][0, 0], state["s_embedder.proj.weight"][..., 0, 0].T
    )
    query = state["blocks.4.attn.qkv.weight"][:24]
    kernel = params["dec_blocks"]["attn"]["qkv"]["kernel"]
    np.testing.assert_array_equal(kernel[1, :, 0, 2], query[16:].T)


def changed(state, name, value):
    return {key: x for key, x in {**state, name: value}.items() if x is not None}


@pytest.mark.parametrize(
    ("key", "value", "pattern"),
    [
        ("blocks.4.norm2.weight", None, r"missing .*\n +blocks\.4\.norm2\.weight"),
        ("s_projector.bias", None, r"missing .*\n +s_projector\.bias"),
        ("blocks.5.norm1.weight", np.ones(24), r"not known .*\n +blocks\.5\.norm1\.weight"),
        ("register_tokens", np.ones((1, 4, 16)), r"not known .*\n +register_tokens"),
        ("feat_rope.freqs_cos", np.ones((16, 8)), r"not known .*\n +feat_rope\.freqs_cos"),
        (
            "blocks.3.attn.qkv.weight",
            np.ones((48, 16)),
            r"blocks\.3\.attn\.qkv\.weight is \[48, 16\], the model's .* needs \[72, 24\]",
        ),
    ],
)
def test_every_key_must_fit(key, value, pattern):
    model = DiTDH(**SIZES)
    with pytest.raises(ConversionError, match=pattern):
        torch_to_flax(changed(make_state(model), key, value), dit_dh_rules(model))


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (dict(num_registers=4, register_start=1), r"4 registers .*\n.*--register-start"),
        (SAME_WIDTH, r"5 blocks are all 16 wide.*\n.*--decoder-depth"),
        (dict(use_rope=False), r"number of heads .*\n.*--num-heads"),
        (dict(use_rope=False, use_pos_embed=False), r"input's size"),
    ],
)
def test_what_a_file_does_not_hold_is_asked_for(flags, pattern):
    with pytest.raises(ConversionError, match=pattern):
        infer_model(make_state(DiTDH(**{**SIZES, **flags})))


def test_heads_of_either_part_are_asked_for():
    state = make_state(DiTDH(**SIZES, use_rope=False))
    with pytest.raises(ConversionError, match="--decoder-num-heads"):
        infer_model(state, num_heads=2)


@pytest.mark.parametrize("decoder_depth", [5, 9])
def test_a_head_that_leaves_no_encoder_is_refused(decoder_depth):
    with pytest.raises(ConversionError, match=r"5 blocks .*\n.*--decoder-depth"):
        infer_model(make_state(DiTDH(**SIZES)), decoder_depth=decoder_depth)


def test_other_models_are_refused():
    names = ("input_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")
    state = make_state(LightningDiT(**{name: SIZES[name] for name in names}))
    with pytest.raises(ConversionError, match=r"no DiTDH: s_embedder\.proj\.weight missing"):
        infer_model(state)


def test_command_converts_and_exports_the_same_bytes(tmp_path):
    model = DiTDH(**SIZES, num_registers=4, register_start=2)
    source, folder, back = (tmp_path / name for name in ("ep.safetensors", "out", "b.safetensors"))
    save_file(make_state(model), source)
    assert main(["ditdh", f"--source={source}", f"--out={folder}", "--register-start=2"]) == 0
    _, record = load_converted(folder)
    assert record["family"] == "ditdh" and DiTDH(**record["model"]) == model
    assert main(["export", f"--source={folder}", f"--out={back}"]) == 0
    assert back.read_bytes() == save(load_file(source))
