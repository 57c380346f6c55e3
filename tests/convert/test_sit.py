"""SiT's table: exact round trips, sizes read off files, strictness, the trainer's own files."""

import argparse
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from dsr_jax.convert.__main__ import main
from dsr_jax.convert.files import load_converted
from dsr_jax.convert.lightningdit import lightningdit_rules
from dsr_jax.convert.rules import flax_to_torch, torch_to_flax
from dsr_jax.convert.sit import infer_model, sit_rules
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.trees import flatten_names
from dsr_jax.models.dit import LightningDiT
from dsr_jax.models.sit import SIT, SiT
from tests.convert.official_states import make_state
from tests.requirements import require

GOLDEN = Path(__file__).parent.parent / "golden" / "denoiser_sit_tiny"
SIZES = dict(input_size=8, in_channels=4, hidden_size=16, depth=3, num_heads=2, num_classes=5)
CASES = {
    "released": {},
    "without_sigma": dict(learn_sigma=False),
    "registers_from_the_start": dict(num_registers=4, register_start=0),
    "registers_from_block_2": dict(num_registers=9, register_start=2),
    "patch_4": dict(patch_size=4, mlp_ratio=3.0),
}


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_exact_and_sizes_are_read_off_the_file(name: str) -> None:
    model = SiT(**{**SIZES, **CASES[name]})
    rules, state = sit_rules(model), make_state(model)
    params = torch_to_flax(state, rules)
    assert {path: x.shape for path, x in flatten_names(params).items()} == dict(rules.shapes)
    back = flax_to_torch(params, rules)
    assert set(back) == set(state)
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)
    given = {"register_start": model.register_start} if model.num_registers else {}
    assert infer_model(state, num_heads=2, **given) == model


def test_the_originals_state_dict_comes_back() -> None:
    state = load_file(GOLDEN / "weights.safetensors")
    model = infer_model(state, num_heads=3)
    back = flax_to_torch(torch_to_flax(state, sit_rules(model)), sit_rules(model))
    assert set(back) == set(state)
    for name, value in back.items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)


@pytest.mark.parametrize("variant", SIT)
def test_heads_of_released_sizes_are_known(variant: str) -> None:
    width, depth = SIT[variant]["hidden_size"], SIT[variant]["depth"]
    shapes = {
        "pos_embed": (1, 256, width),
        "x_embedder.proj.weight": (width, 4, 2, 2),
        "y_embedder.embedding_table.weight": (1001, width),
        "blocks.0.attn.qkv.weight": (3 * width, width),
        "blocks.0.mlp.fc2.weight": (width, 4 * width),
        "final_layer.linear.weight": (32, width),
    }
    state = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    state |= {f"blocks.{i}.attn.proj.bias": np.zeros(1) for i in range(depth)}
    want = SiT(input_size=32, in_channels=4, num_classes=1000, **SIT[variant])
    assert infer_model(state) == want


def test_other_heads_are_asked_for() -> None:
    with pytest.raises(ConversionError, match="number of heads .*\n.*--num-heads"):
        infer_model(make_state(SiT(**SIZES)))
    registers = make_state(SiT(**SIZES, num_registers=4, register_start=1))
    with pytest.raises(ConversionError, match=r"4 registers .*\n.*--register-start"):
        infer_model(registers, num_heads=2)


@pytest.mark.parametrize(
    ("key", "value", "pattern"),
    [
        ("blocks.2.mlp.fc1.weight", None, r"missing .*\n +blocks\.2\.mlp\.fc1\.weight"),
        ("blocks.0.norm1.weight", np.ones(16), r"not known .*\n +blocks\.0\.norm1\.weight"),
        ("t_embedder.W", np.ones(256), r"not known .*\n +t_embedder\.W"),
        ("feat_rope.freqs_cos", np.ones((16, 8)), r"not known .*\n +feat_rope\.freqs_cos"),
        ("t_embedder.mlp.0.weight", np.ones((16, 512)), r"mlp\.0\.weight is \[16, 512\]"),
    ],
)
def test_every_key_must_fit(key: str, value: np.ndarray | None, pattern: str) -> None:
    model = SiT(**SIZES)
    state = {name: x for name, x in {**make_state(model), key: value}.items() if x is not None}
    with pytest.raises(ConversionError, match=pattern):
        torch_to_flax(state, sit_rules(model))


def test_lightningdit_is_not_taken_for_sit_nor_the_other_way() -> None:
    flags = dict(use_rope=False, use_rmsnorm=False, use_swiglu=False)
    other = LightningDiT(**SIZES, **flags, patch_size=2, learn_sigma=True)
    with pytest.raises(ConversionError, match=r"not known .*\n +t_embedder\.W"):
        torch_to_flax(make_state(other), sit_rules(SiT(**SIZES)))
    with pytest.raises(ConversionError, match=r"missing .*\n +t_embedder\.W"):
        torch_to_flax(make_state(SiT(**SIZES)), lightningdit_rules(other))


def test_command_converts_and_exports_the_same_bytes(tmp_path: Path) -> None:
    model = SiT(**SIZES, num_registers=4, register_start=2)
    source, folder, back = (tmp_path / name for name in ("ema.safetensors", "out", "b.safetensors"))
    save_file(make_state(model), source)
    options = ["--register-start=2", "--num-heads=2"]
    assert main(["sit", f"--source={source}", f"--out={folder}", *options]) == 0
    _, record = load_converted(folder)
    assert record["family"] == "sit" and SiT(**record["model"]) == model
    assert main(["export", f"--source={folder}", f"--out={back}"]) == 0
    assert back.read_bytes() == save(load_file(source))


def test_a_file_of_the_trainer_is_read_for_its_ema(tmp_path: Path) -> None:
    torch = require("torch", "torch")
    state = {name: torch.from_numpy(x) for name, x in make_state(SiT(**SIZES)).items()}
    raw = {name: x + 1 for name, x in state.items()}
    arguments = argparse.Namespace(model="SiT-XL/2", epochs=1400)
    path = tmp_path / "0400000.pt"
    torch.save({"model": raw, "ema": state, "opt": {"state": {}}, "args": arguments}, path)
    main(["sit", f"--source={path}", f"--out={tmp_path / 'out'}", "--num-heads=2"])
    params, _ = load_converted(tmp_path / "out")
    np.testing.assert_array_equal(params["pos_embed"], state["pos_embed"].numpy())
