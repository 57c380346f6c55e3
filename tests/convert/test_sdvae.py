"""The SD-VAE's table: old and new names, snapshots and bare files, exactness, strictness."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from dsr_jax.convert.__main__ import main
from dsr_jax.convert.rules import flax_to_torch
from dsr_jax.convert.sdvae import (
    config_from_diffusers,
    infer_config,
    load_vae,
    read_vae,
    sdvae_rules,
)
from dsr_jax.convert.vae_names import NameStyle, modernize, restyle
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.trees import flatten_names
from dsr_jax.models.vae import VAEConfig
from tests.tiny_vae import CONFIG, vae_params

RELEASED = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.4.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
"""What config.json beside sd-vae-ft-ema holds."""
TINY = RELEASED | {
    "block_out_channels": list(CONFIG.widths),
    "layers_per_block": CONFIG.layers_per_block,
    "norm_num_groups": CONFIG.num_groups,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
STYLES = {
    "today": NameStyle(),
    "old": NameStyle(old_names=True),
    "older": NameStyle(old_names=True, convolutions=True),
}


def state(style: NameStyle = STYLES["today"]) -> dict[str, np.ndarray]:
    """An original's state dict."""
    return restyle(flax_to_torch(vae_params(), sdvae_rules(CONFIG)), style)


def snapshot(folder: Path, content: dict[str, np.ndarray], record: Any = TINY) -> Path:
    """Writes a folder as the hub has it; returns its file of weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(record))
    save_file(content, folder / "diffusion_pytorch_model.safetensors")
    return folder / "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("name", STYLES)
def test_the_command_and_its_way_back_are_exact(name: str, tmp_path: Path) -> None:
    source = snapshot(tmp_path / "hub", state(STYLES[name]))
    main(["sdvae", f"--source={source.parent}", f"--out={tmp_path / 'out'}"])
    vae = load_vae(tmp_path / "out")
    assert (vae.config, vae.normalization.scale, vae.style) == (CONFIG, 0.18215, STYLES[name])
    want = flatten_names(vae_params())
    for path, value in flatten_names(vae.params).items():
        np.testing.assert_array_equal(value, want[path], err_msg=path)
    back = tmp_path / "back.safetensors"
    main(["export", f"--source={tmp_path / 'out'}", f"--out={back}"])
    assert back.read_bytes() == save(load_file(source))


def test_names_are_the_originals() -> None:
    names = set(state())
    assert {
        "encoder.conv_in.weight",
        "encoder.down_blocks.0.resnets.0.norm1.weight",
        "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
        "encoder.down_blocks.0.downsamplers.0.conv.weight",
        "encoder.mid_block.attentions.0.group_norm.weight",
        "encoder.mid_block.attentions.0.to_out.0.bias",
        "encoder.mid_block.resnets.1.conv2.weight",
        "encoder.conv_norm_out.bias",
        "decoder.up_blocks.1.resnets.1.conv1.weight",
        "decoder.up_blocks.0.upsamplers.0.conv.bias",
        "post_quant_conv.weight",
        "quant_conv.weight",
    } < names
    middle = "decoder.mid_block.attentions.0"
    old = state(STYLES["older"])
    assert old[f"{middle}.proj_attn.weight"].shape == (12, 12, 1, 1)
    assert f"{middle}.group_norm.weight" in old and f"{middle}.to_q.weight" not in old
    assert state(STYLES["old"])[f"{middle}.query.weight"].shape == (12, 12)


def test_released_sizes() -> None:
    assert config_from_diffusers(RELEASED) == VAEConfig()
    rules = sdvae_rules(VAEConfig())
    assert len(rules.rules) == 248
    shapes = {rule.source: rule.source_shape(rules.shapes[rule.target]) for rule in rules.rules}
    middle = "encoder.mid_block.attentions.0.to_k.weight"
    assert shapes[middle] == (512, 512)
    assert shapes["decoder.up_blocks.3.resnets.0.conv_shortcut.weight"] == (128, 256, 1, 1)
    stand_in = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    assert infer_config(stand_in) == VAEConfig()


def test_a_bare_file_determines_all_sizes_but_the_groups(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "vae.safetensors")
    assert read_vae(tmp_path / "vae.safetensors", num_groups=4).config == CONFIG
    three = dataclasses.replace(CONFIG, widths=(4, 8, 8), layers_per_block=2)
    shapes = flax_to_torch(vae_params(three), sdvae_rules(three))
    assert infer_config(shapes, num_groups=4) == three


def test_the_scale_of_another_autoencoder_is_kept(tmp_path: Path) -> None:
    source = snapshot(tmp_path / "hub", state(), TINY | {"scaling_factor": 0.13025})
    assert read_vae(source).normalization.scale == 0.13025


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"_class_name": "VQModel"}, "describes a 'VQModel'"),
        ({"act_fn": "relu"}, "'act_fn': 'relu'"),
        ({"out_channels": 4}, "'out_channels': 4"),
        ({"down_block_types": ["AttnSkipDownBlock2D"] * 2}, "AttnSkip"),
    ],
)
def test_options_without_an_implementation_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ConversionError, match=match):
        config_from_diffusers(TINY | change)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    whole = state()
    key = "decoder.up_blocks.1.resnets.0.conv_shortcut.weight"

    def refuse(number: int, content: dict[str, np.ndarray], match: str) -> None:
        source = snapshot(tmp_path / str(number), content)
        with pytest.raises(ConversionError, match=match):
            read_vae(source)

    refuse(0, {**whole, "surprise": np.zeros(1)}, "not known to the model.*\n.*surprise")
    refuse(1, {k: v for k, v in whole.items() if k != key}, f"missing.*\n.*{key}")
    refuse(2, {**whole, key: whole[key][:4]}, rf"{key} is \[4, 12, 1, 1\]")
    with pytest.raises(ConversionError, match="no AutoencoderKL of diffusers.*encoder.conv_in"):
        infer_config({"a": np.zeros(1)})
    with pytest.raises(ConversionError, match=r"attentions\.0\.to_.* under two names"):
        modernize({**whole, **state(STYLES["old"])})
