"""DINO's backbone and the discriminator's heads: both ways, and strictness."""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsr_jax.convert import __main__ as command
from dsr_jax.convert.decoder import save_decoder
from dsr_jax.convert.discriminator import (
    backbone_rules,
    fuse_qkv,
    heads_rules,
    heads_to_flax,
    infer_backbone,
    load_backbone,
    read_backbone,
)
from dsr_jax.convert.rules import RuleSet, flax_to_torch
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.trees import flatten_names
from dsr_jax.models.discriminator import SPECTRAL, Discriminator, Heads
from dsr_jax.models.variants import DINO, RANDOM_BACKBONES
from dsr_jax.models.vit import ViT, ViTConfig
from tests.tiny_rae import DECODER, decoder_params

CONFIG = ViTConfig(**RANDOM_BACKBONES["tiny"])
NETWORK = Discriminator(ViT(CONFIG), (0, 1), Heads(3))


def random_state(rules: RuleSet) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        name: random.standard_normal(rule.source_shape(rules.shapes[target])).astype(np.float32)
        for rule in rules.rules
        for target, names in rule.pieces()
        for name in names
    }


def state() -> dict[str, np.ndarray]:
    """An original state dict of a backbone."""
    unused = {f"norm.{name}": np.zeros(32, np.float32) for name in ("weight", "bias")}
    return fuse_qkv(random_state(backbone_rules(CONFIG))) | unused


def save(folder: Path, content: dict[str, np.ndarray]) -> Path:
    save_file(content, folder / "dino.safetensors")
    return folder / "dino.safetensors"


def test_the_command_and_its_way_back_are_exact(tmp_path: Path) -> None:
    source, out, back = save(tmp_path, state()), tmp_path / "dino", tmp_path / "back.safetensors"
    command.main(["dino_discriminator", f"--source={source}", f"--out={out}", "--num-heads=2"])
    config, params = load_backbone(out)
    assert config == CONFIG
    init = ViT(config).init
    abstract: Any = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    shapes = {name: x.shape for name, x in flatten_names(nn.unbox(abstract)).items()}
    assert {name: x.shape for name, x in flatten_names(params).items()} == shapes
    command.main(["export", f"--source={out}", f"--out={back}"])
    got = load_file(back)
    want = {name: x for name, x in state().items() if not name.startswith("norm.")}
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_names_are_the_originals() -> None:
    assert {"cls_token", "patch_embed.proj.weight", "blocks.2.attn.qkv.bias"} < set(state())
    assert {"blocks.0.attn.proj.weight", "blocks.1.mlp.fc2.weight"} < set(state())


@pytest.mark.parametrize("name", DINO)
def test_released_sizes_need_no_heads(name: str) -> None:
    config = ViTConfig(**DINO[name])
    shapes = {
        "patch_embed.proj.weight": (config.hidden_size, 1, config.patch_size, 1),
        "pos_embed": (1, 1 + (224 // config.patch_size) ** 2, 1),
        "blocks.0.mlp.fc1.weight": (config.mlp_dim, 1),
    }
    shapes |= {f"blocks.{i}.norm1.weight": (1,) for i in range(config.depth)}
    assert infer_backbone({name: np.zeros(shape) for name, shape in shapes.items()}) == config


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    whole = state()
    with pytest.raises(ConversionError, match="32 wide.*\n.*--num-heads"):
        read_backbone(save(tmp_path, whole))
    with pytest.raises(ConversionError, match="nowhere.pth does not exist"):
        read_backbone(tmp_path / "nowhere.pth")

    def refuse(content: dict[str, np.ndarray], match: str) -> None:
        with pytest.raises(ConversionError, match=match):
            read_backbone(save(tmp_path, content), num_heads=2)

    refuse(whole | {"head.weight": np.zeros(1)}, "not known to the model.*\n.*head.weight")
    refuse({k: v for k, v in whole.items() if k != "cls_token"}, "missing.*\n.*cls_token")
    refuse({k: v for k, v in whole.items() if "patch_embed" not in k}, "proj.weight is absent")
    refuse(whole | {"pos_embed": np.zeros((1, 16, 32))}, "15 positions form no square")
    refuse(whole | {"blocks.1.attn.qkv.bias": np.zeros(95)}, r"qkv.bias is \[95\]")
    refuse(whole | {"blocks.1.mlp.fc1.bias": np.zeros(3)}, r"mlp.fc1.bias is \[3\]")


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    save_decoder(tmp_path / "decoder", DECODER, decoder_params(), {})
    with pytest.raises(ConversionError, match="not the discriminator's backbone"):
        load_backbone(tmp_path / "decoder")


def test_heads_and_their_singular_vectors_go_both_ways() -> None:
    rules = heads_rules(NETWORK)
    whole = random_state(rules)
    assert whole["heads.0.1.fn.0.weight_orig"].shape == (32, 32, 3)
    assert whole["heads.2.1.fn.0.weight_v"].shape == (96,) and whole["heads.2.2.weight_u"].size == 1
    assert len(whole) == 3 * (3 * 4 + 2 * 2)
    params, spectral = heads_to_flax(NETWORK, whole)
    back = flax_to_torch({"params": params, SPECTRAL: spectral}, rules)
    for name, value in whole.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    other = dataclasses.replace(NETWORK, key_depths=(0,))
    with pytest.raises(ConversionError, match="heads.2"):
        heads_to_flax(other, whole)
