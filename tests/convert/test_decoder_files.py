"""RAE's decoder and statistics files: both directions, whole checkpoints, strictness."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsr_jax.convert import __main__ as command
from dsr_jax.convert.decoder import decoder_rules, infer_decoder, load_decoder, read_decoder
from dsr_jax.convert.encoders import encoder_rules
from dsr_jax.convert.hub import load_encoder
from dsr_jax.convert.rules import flax_to_torch
from dsr_jax.convert.statistics import load_statistics, save_statistics
from dsr_jax.core.errors import ConversionError
from dsr_jax.models.variants import DECODERS
from tests.requirements import require
from tests.tiny_rae import DECODER, ENCODER, decoder_params, encoder_params, statistics

HEADS = f"--num-heads={DECODER.num_heads}"


def state() -> dict[str, np.ndarray]:
    """An official state dict."""
    return flax_to_torch(decoder_params(), decoder_rules(DECODER))


def checkpoint() -> dict[str, np.ndarray]:
    """All of a checkpoint of RAE."""
    encoder = flax_to_torch(encoder_params(), encoder_rules(ENCODER))
    whole = {f"encoder.model.{name}": x for name, x in encoder.items()}
    return whole | {f"decoder.{name}": x for name, x in state().items()}


def equal(tree: Any, want: Any) -> None:
    assert tree.keys() == want.keys()
    for key, value in want.items():
        if isinstance(value, dict):
            equal(tree[key], value)
        else:
            np.testing.assert_array_equal(tree[key], value, err_msg=key)


@pytest.mark.parametrize("content", [state, checkpoint])
def test_the_command_and_its_way_back_are_exact(content: Any, tmp_path: Path) -> None:
    source, out = tmp_path / "decoder.safetensors", tmp_path / "decoder"
    save_file(content(), source)
    command.main(["decoder", f"--source={source}", f"--out={out}", HEADS])
    config, params = load_decoder(out)
    assert config == DECODER
    equal(params, decoder_params())
    back = tmp_path / "back.safetensors"
    command.main(["export", f"--source={out}", f"--out={back}"])
    equal(load_file(back), state())


def test_names_are_the_originals() -> None:
    names = set(state())
    block = "decoder_layers.1."
    assert {
        "trainable_cls_token",
        "decoder_pos_embed",
        "decoder_embed.weight",
        "decoder_norm.bias",
        "decoder_pred.weight",
        f"{block}layernorm_before.weight",
        f"{block}attention.attention.query.weight",
        f"{block}attention.output.dense.bias",
        f"{block}intermediate.dense.weight",
        f"{block}output.dense.bias",
    } < names
    assert len(names) == 8 + 2 * 16


def test_an_entry_of_a_torch_checkpoint_is_read(tmp_path: Path) -> None:
    torch = require("torch", "torch")
    tensors = {name: torch.from_numpy(x) for name, x in checkpoint().items()}
    raw = {name: x + 1 for name, x in tensors.items()}
    torch.save({"model": raw, "ema": tensors, "step": 3}, tmp_path / "ep-0000001.pt")
    config, params = read_decoder(tmp_path / "ep-0000001.pt", num_heads=2)
    assert config == DECODER
    equal(params, decoder_params())
    other = read_decoder(tmp_path / "ep-0000001.pt", num_heads=2, entry="model")[1]
    np.testing.assert_array_equal(other["pos_embed"], params["pos_embed"] + 1)


def test_released_sizes_need_no_heads() -> None:
    for sizes in DECODERS.values():
        config = dataclasses.replace(DECODER, **sizes)
        width, hidden = sizes["hidden_size"], sizes["mlp_dim"]
        shapes = {
            "decoder_embed.weight": (width, config.latent_channels),
            "decoder_pos_embed": (1, 1 + config.grid**2, 1),
            "decoder_pred.weight": (config.patch_size**2 * 3, 1),
            "decoder_layers.0.intermediate.dense.weight": (hidden, 1),
        }
        shapes |= {f"decoder_layers.{i}.output.dense.bias": (1,) for i in range(sizes["depth"])}
        assert infer_decoder({name: np.zeros(s) for name, s in shapes.items()}) == config


def refuse(content: dict[str, np.ndarray], match: str, folder: Path, heads: int = 2) -> None:
    save_file(content, folder / "x.safetensors")
    with pytest.raises(ConversionError, match=match):
        read_decoder(folder / "x.safetensors", num_heads=heads)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    whole = state()
    refuse(whole, "give --num-heads", tmp_path, heads=0)
    refuse({**whole, "surprise": np.zeros(1)}, "not known to the model.*\n.*surprise", tmp_path)
    refuse({**checkpoint(), "surprise": np.zeros(1)}, "besides the decoder.*surprise", tmp_path)
    key = "decoder_layers.1.output.dense.weight"
    refuse({k: v for k, v in whole.items() if k != key}, f"missing.*\n.*{key}", tmp_path)
    refuse({**whole, key: whole[key].T.copy()}, f"{key} is \\[20, 12\\]", tmp_path)
    refuse({k: v for k, v in whole.items() if k != "decoder_embed.weight"}, "absent", tmp_path)
    refuse({**whole, "decoder_pos_embed": np.zeros((1, 16, 12))}, "15 positions form no", tmp_path)
    mae = {f"decoder.{k}": v for k, v in whole.items() if k != "trainable_cls_token"}
    refuse({**mae, "decoder.mask_token": np.zeros(1)}, "MAE's own decoder", tmp_path)


def test_folders_of_other_models_are_refused(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "x.safetensors")
    source = f"--source={tmp_path / 'x.safetensors'}"
    command.main(["decoder", source, f"--out={tmp_path / 'decoder'}", HEADS])
    with pytest.raises(ConversionError, match="holds a decoder, not an encoder"):
        load_encoder(tmp_path / "decoder")


def test_statistics_go_to_the_official_form_and_back(tmp_path: Path) -> None:
    torch = require("torch", "torch")
    ours, official = tmp_path / "statistics.safetensors", tmp_path / "stats.pt"
    save_statistics(ours, statistics())
    command.main(["statistics", f"--source={ours}", f"--out={official}"])
    content = torch.load(official, weights_only=True)
    assert set(content) == {"mean", "var"} and content["mean"].shape == (16, 4, 4)
    assert content["mean"][5, 1, 2] == statistics()["mean"][1, 2, 5]
    command.main(["statistics", f"--source={official}", f"--out={tmp_path / 'b.safetensors'}"])
    assert (tmp_path / "b.safetensors").read_bytes() == ours.read_bytes()
    equal(load_statistics(tmp_path), statistics())
    with pytest.raises(ConversionError, match="exists"):
        command.main(["statistics", f"--source={ours}", f"--out={official}"])


def test_a_missing_half_of_official_statistics_counts_as_none(tmp_path: Path) -> None:
    torch = require("torch", "torch")
    var = torch.rand(3, 2, 2)
    torch.save({"mean": None, "var": var}, tmp_path / "stats.pt")
    found = load_statistics(tmp_path / "stats.pt")
    assert not found["mean"].any() and found["var"].shape == (2, 2, 3)
    torch.save({"mean": var}, tmp_path / "stats.pt")
    assert (load_statistics(tmp_path / "stats.pt")["var"] == 1).all()


def test_odd_statistics_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    good = statistics()
    for content, problem in (
        ({**good, "std": good["var"]}, "holds std"),
        ({**good, "var": good["var"][:2].copy()}, "of shapes"),
        ({**good, "var": -good["var"]}, "variance below 0"),
        ({**good, "mean": good["mean"] * np.float32(np.nan)}, "not finite"),
    ):
        save_file(content, path)
        with pytest.raises(ConversionError, match=problem):
            load_statistics(path)
    with pytest.raises(ConversionError, match="does not exist"):
        load_statistics(tmp_path / "absent.pt")
    with pytest.raises(ConversionError, match="name a .safetensors or .pt file"):
        save_statistics(tmp_path / "x.npy", good)
