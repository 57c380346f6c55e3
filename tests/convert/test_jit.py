"""JiT's table: exact round trips under all flags, sizes read off files, strictness, commands."""

import argparse
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from dsr_jax.convert.__main__ import main
from dsr_jax.convert.files import load_converted
from dsr_jax.convert.jit import CONVERTER, infer_model, jit_rules
from dsr_jax.convert.rules import flax_to_torch, torch_to_flax
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.trees import flatten_names
from dsr_jax.models.jit import JiT
from tests.convert.official_states import make_state

GOLDEN = Path(__file__).parent.parent / "golden"
SIZES = dict(
    input_size=8,
    in_channels=3,
    patch_size=4,
    hidden_size=16,
    depth=3,
    num_heads=2,
    num_classes=5,
    bottleneck_dim=6,
    num_class_tokens=3,
    class_token_start=1,
)
CASES = {
    "released": {},
    "class_tokens_from_the_start": dict(class_token_start=0),
    "registers_beside": dict(num_registers=4, register_start=2),
    "registers_before": dict(class_token_start=2, num_registers=4, register_start=1),
    "registers_at_the_same_block": dict(num_registers=4, register_start=1),
    "registers_alone": dict(
        num_class_tokens=0, class_token_start=0, num_registers=9, register_start=1
    ),
    "neither": dict(num_class_tokens=0, class_token_start=0),
    "no_qk_norm": dict(use_qknorm=False),
    "wide_mlp": dict(mlp_ratio=6.0),
}


def wrapped(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As a checkpoint names them."""
    return {CONVERTER.prefix + name: value for name, value in state.items()}


def starts(model: JiT) -> dict[str, int]:
    """What a file does not hold."""
    given = {"class_token_start": model.class_token_start} if model.num_class_tokens else {}
    return given | ({"register_start": model.register_start} if model.num_registers else {})


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_exact(name: str) -> None:
    model = JiT(**{**SIZES, **CASES[name]})
    rules, state = jit_rules(model), make_state(model)
    params = torch_to_flax(state, rules)
    assert {path: x.shape for path, x in flatten_names(params).items()} == dict(rules.shapes)
    back = flax_to_torch(params, rules)
    assert set(back) == set(state)
    for key, value in state.items():
        assert back[key].dtype == value.dtype
        np.testing.assert_array_equal(back[key], value, err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_model_is_read_off_the_file(name: str) -> None:
    model = JiT(**{**SIZES, **CASES[name]})
    heads = {} if model.use_qknorm else {"num_heads": model.num_heads}
    assert infer_model(make_state(model), **starts(model), **heads) == model


def test_original_state_dict_comes_back() -> None:
    state = load_file(GOLDEN / "denoiser_jit" / "weights.safetensors")
    model = infer_model(state, class_token_start=1)
    assert (model.num_heads, model.num_class_tokens, model.bottleneck_dim) == (4, 5, 12)
    back = flax_to_torch(torch_to_flax(state, jit_rules(model)), jit_rules(model))
    assert set(back) == set(state)
    for name, value in back.items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)


def test_rope_tables_of_earlier_exports_are_ignored() -> None:
    model = JiT(**SIZES)
    tables = {f"feat_rope.freqs_{part}": np.ones((4, 8), np.float32) for part in ("cos", "sin")}
    torch_to_flax(make_state(model) | tables, jit_rules(model))


def test_blocks_are_assigned_to_the_stack_with_their_tokens() -> None:
    model = JiT(**SIZES, num_registers=4, register_start=2)
    state = make_state(model)
    params = torch_to_flax(state, jit_rules(model))
    for number, stack in enumerate(("blocks_pre", "blocks_ctx", "blocks_reg")):
        kernel = params[stack]["mlp"]["w3"]["kernel"]
        np.testing.assert_array_equal(kernel[0], state[f"blocks.{number}.mlp.w3.weight"].T)
    np.testing.assert_array_equal(
        params["x_embedder"]["proj2"]["kernel"][0, 0], state["x_embedder.proj2.weight"][..., 0, 0].T
    )


def changed(state: dict[str, np.ndarray], name: str, value: object) -> dict[str, np.ndarray]:
    return {key: x for key, x in {**state, name: value}.items() if x is not None}


@pytest.mark.parametrize(
    ("key", "value", "pattern"),
    [
        ("in_context_posemb", None, r"missing .*\n +in_context_posemb"),
        ("blocks.2.norm2.weight", None, r"missing .*\n +blocks\.2\.norm2\.weight"),
        ("x_embedder.proj1.bias", np.ones(6), r"not known .*\n +x_embedder\.proj1\.bias"),
        ("register_tokens", np.ones((1, 4, 16)), r"not known .*\n +register_tokens"),
        (
            "x_embedder.proj2.weight",
            np.ones((16, 6)),
            r"proj2\.weight is \[16, 6\], the model's .* needs \[16, 6, 1, 1\]",
        ),
    ],
)
def test_every_key_must_fit(key: str, value: object, pattern: str) -> None:
    model = JiT(**SIZES)
    with pytest.raises(ConversionError, match=pattern):
        torch_to_flax(changed(make_state(model), key, value), jit_rules(model))


@pytest.mark.parametrize(
    ("flags", "given", "pattern"),
    [
        ({}, {}, r"3 class tokens .*\n.*--class-token-start"),
        (
            dict(num_registers=4, register_start=2),
            {"class_token_start": 1},
            r"4 registers .*\n.*--register-start",
        ),
    ],
)
def test_what_a_file_does_not_hold_is_asked_for(flags: dict, given: dict, pattern: str) -> None:
    with pytest.raises(ConversionError, match=pattern):
        infer_model(make_state(JiT(**SIZES, **flags)), **given)


def test_released_sizes_determine_the_first_block_with_registers() -> None:
    state = {
        "pos_embed": np.empty((1, 256, 1280)),
        "x_embedder.proj1.weight": np.empty((256, 3, 16, 16)),
        "y_embedder.embedding_table.weight": np.empty((1001, 1)),
        "blocks.31.norm1.weight": np.empty(1280),
        "blocks.0.norm1.weight": np.empty(1280),
        "blocks.0.attn.q_norm.weight": np.empty(80),
        "blocks.0.mlp.w12.weight": np.empty((1, 1)),
        "blocks.0.mlp.w3.weight": np.empty((1, 3413)),
        "in_context_posemb": np.empty((1, 32, 1280)),
    }
    model = infer_model(state)
    assert (model.depth, model.num_heads, model.class_token_start) == (32, 16, 10)
    assert model.input_size == 256 and model.mlp_ratio == 4.0


def test_other_models_are_refused() -> None:
    state = make_state(JiT(**SIZES))
    del state["x_embedder.proj1.weight"]
    with pytest.raises(ConversionError, match=r"no JiT: x_embedder\.proj1\.weight missing"):
        infer_model(state)


def test_a_prefix_goes_only_if_all_names_have_it() -> None:
    assert set(CONVERTER.strip_prefix({"net.a": 1, "net.b": 2})) == {"a", "b"}
    assert set(CONVERTER.strip_prefix({"net.a": 1, "b": 2})) == {"net.a", "b"}


def test_command_converts_and_exports_the_same_bytes(tmp_path: Path) -> None:
    model = JiT(**SIZES)
    source, folder, back = (tmp_path / name for name in ("jit.safetensors", "out", "b.safetensors"))
    save_file(wrapped(make_state(model)), source)
    assert main(["jit", f"--source={source}", f"--out={folder}", "--class-token-start=1"]) == 0
    _, record = load_converted(folder)
    assert record["family"] == "jit" and JiT(**record["model"]) == model
    assert "dropout" not in record["model"]
    assert main(["export", f"--source={folder}", f"--out={back}"]) == 0
    assert back.read_bytes() == save(load_file(source))


@pytest.mark.parametrize(
    ("given", "chosen"), [([], 0), (["--entry=model_ema2"], 1), (["--entry=model"], 2)]
)
def test_each_entry_of_a_checkpoint_is_reached(
    tmp_path: Path, given: list[str], chosen: int
) -> None:
    torch = pytest.importorskip("torch")
    model = JiT(**SIZES)
    states = [wrapped(make_state(model, seed)) for seed in range(3)]
    checkpoint = {
        name: {key: torch.from_numpy(value) for key, value in state.items()}
        for name, state in zip(CONVERTER.entries, states, strict=True)
    }
    rest = {"epoch": 3, "optimizer": {"state": {}}, "args": argparse.Namespace(model="JiT-B/16")}
    source, folder, back = (tmp_path / name for name in ("checkpoint-last.pth", "out", "back.pth"))
    torch.save(checkpoint | rest, source)
    main(["jit", f"--source={source}", f"--out={folder}", "--class-token-start=1", *given])
    main(["export", f"--source={folder}", f"--out={back}"])
    exported = torch.load(back, weights_only=True)
    assert set(exported) == set(CONVERTER.entries)
    for state in exported.values():
        assert set(state) == set(states[chosen])
        for key, value in states[chosen].items():
            np.testing.assert_array_equal(state[key].numpy(), value, err_msg=key)
