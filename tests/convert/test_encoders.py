"""Encoders of transformers against ours, layer by layer; strictness; snapshots and hub ids."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsr_jax.convert import __main__ as command
from dsr_jax.convert.encoders import config_from_hub, encoder_rules, take_encoder
from dsr_jax.convert.hub import load_encoder, read_encoder
from dsr_jax.convert.readers import read_state
from dsr_jax.convert.rules import flax_to_torch, torch_to_flax
from dsr_jax.core.errors import ConversionError
from dsr_jax.models.variants import ENCODERS
from dsr_jax.models.vit import ViTConfig
from tests.convert.hub_models import DINOV3, KINDS, save_snapshot
from tests.requirements import require

FAMILY = {"siglip": "siglip2", "dinov2": "dinov2", "dinov2_with_registers": "dinov2"}
FAMILY |= {"vit_mae": "mae"} | dict.fromkeys(DINOV3, "dinov3")


@pytest.fixture(scope="module", params=KINDS)
def snapshot(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot folder of each kind."""
    require("torch", "torch")
    require("transformers", "hub")
    folder = tmp_path_factory.mktemp(request.param)
    save_snapshot(request.param, folder)
    return folder


def pixels(config: ViTConfig, patches: int) -> np.ndarray:
    side = patches * config.patch_size
    return np.random.default_rng(0).standard_normal((2, side, side, 3), np.float32)


def test_every_layer_agrees_with_transformers_at_another_resolution(snapshot: Path) -> None:
    from tools.compare_torch import compare

    config, _ = read_encoder(snapshot)
    differences = compare(snapshot, pixels(config, 6))
    assert [d.layer for d in differences] == ["block 0", "block 1", "tokens"]
    assert max(d.relative for d in differences) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_block_of_real_width_agrees(kind: str, tmp_path: Path) -> None:
    require("torch", "torch")
    require("transformers", "hub")
    from tools.compare_torch import compare

    save_snapshot(kind, tmp_path, num_hidden_layers=1, hidden_size=768, num_attention_heads=12)
    config, _ = read_encoder(tmp_path)
    assert max(d.relative for d in compare(tmp_path, pixels(config, 4))) < 1e-5


def test_round_trip_is_exact(snapshot: Path) -> None:
    config, params = read_encoder(snapshot)
    state = take_encoder(read_state(snapshot), config.family)
    rules = encoder_rules(config)
    back = flax_to_torch(params, rules)
    assert set(state) - set(back) == {key for key in state if rules.is_dropped(key)}
    for key, value in back.items():
        np.testing.assert_array_equal(value, state[key], err_msg=key)


def test_the_command_writes_what_load_encoder_reads(
    snapshot: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    family = FAMILY[request.node.callspec.params["snapshot"]]
    out = tmp_path / "encoder"
    command.main([family, "--source", str(snapshot), "--out", str(out)])
    config, params = load_encoder(out)
    want_config, want = read_encoder(snapshot)
    assert config == want_config
    np.testing.assert_array_equal(params["patch_embed"]["kernel"], want["patch_embed"]["kernel"])
    exported = tmp_path / "back.safetensors"
    command.main(["export", "--source", str(out), "--out", str(exported)])
    state = take_encoder(read_state(snapshot), config.family)
    for key, value in read_state(exported).items():
        np.testing.assert_array_equal(value, state[key], err_msg=key)
    wrong = "mae" if family != "mae" else "siglip2"
    with pytest.raises(ConversionError, match="this is .*, not (MAE|SigLIP2)"):
        command.main([wrong, "--source", str(snapshot), "--out", str(tmp_path / "other")])


def small(family: str) -> tuple[ViTConfig, dict[str, np.ndarray]]:
    """A tiny encoder's config and a random state dict for it."""
    sizes = {"hidden_size": 8, "depth": 2, "num_heads": 2, "mlp_dim": 16}
    name = {"siglip": "siglip2-base-patch16-256", "mae": "mae-base"}[family]
    config = ViTConfig(**{**ENCODERS[name], **sizes, "image_size": 32})
    rules = encoder_rules(config)
    random = np.random.default_rng(0)
    state: dict[str, np.ndarray] = {}
    for rule in rules.rules:
        for target, names in rule.pieces():
            shape = rules.shapes[target][1:] if rule.stacks else rules.shapes[target]
            for key in names:
                state[key] = rule.layout.to_torch(random.standard_normal(shape).astype(np.float32))
    return config, state


@pytest.mark.parametrize("prefix", ["", "vision_model.", "encoder.runner.model.vision_model."])
def test_an_encoder_is_found_below_any_prefix(prefix: str) -> None:
    config, state = small("siglip")
    whole = {prefix + key: value for key, value in state.items()}
    outer = prefix.removesuffix("vision_model.")
    if prefix:
        whole |= {f"{outer}text_model.x": np.zeros(1), f"{outer}logit_scale": np.zeros(1)}
        whole |= {"decoder.decoder_pred.weight": np.zeros(1)}
    whole[prefix + "post_layernorm.weight"] = np.zeros(8)
    taken = take_encoder(whole, "siglip")
    assert set(state) <= set(taken)
    torch_to_flax(taken, encoder_rules(config))


def test_what_does_not_belong_is_named() -> None:
    config, state = small("siglip")
    whole = {f"vision_model.{key}": value for key, value in state.items()}
    with pytest.raises(ConversionError, match="unknown tensors besides .*: surprise"):
        take_encoder({**whole, "surprise": np.zeros(1)}, "siglip")
    with pytest.raises(ConversionError, match="not known to the model"):
        torch_to_flax({**state, "encoder.layers.0.surprise": np.zeros(1)}, encoder_rules(config))
    with pytest.raises(ConversionError, match="which a mae encoder has once"):
        take_encoder(state, "mae")
    key = "encoder.layers.1.mlp.fc1.weight"
    with pytest.raises(ConversionError, match=f"missing.*\n.*{key}"):
        torch_to_flax({k: v for k, v in state.items() if k != key}, encoder_rules(config))
    with pytest.raises(ConversionError, match=f"{key} is \\[8, 16\\]"):
        torch_to_flax({**state, key: state[key].T}, encoder_rules(config))


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"model_type": "siglip2"}, "NaFlex"),
        ({"model_type": "clip"}, "none of the encoders"),
        ({"model_type": "dinov2", "use_swiglu_ffn": True}, "use_swiglu_ffn"),
        ({"model_type": "vit_mae", "hidden_act": "relu"}, "relu"),
    ],
)
def test_other_models_are_refused(record: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConversionError, match=problem):
        config_from_hub(record)


def test_values_that_hub_files_leave_out_are_those_of_transformers() -> None:
    require("transformers", "hub")
    import transformers

    for kind in ("siglip_vision_model", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit_mae"):
        whole = transformers.AutoConfig.for_model(kind).to_dict()
        assert config_from_hub({"model_type": kind}) == config_from_hub(whole), kind


def test_presets_equal_their_hub_configs() -> None:
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
    vision |= {"num_attention_heads": 16, "image_size": 224, "patch_size": 14}
    so400m = config_from_hub({"model_type": "siglip", "vision_config": vision})
    assert so400m == ViTConfig(**ENCODERS["siglip2-so400m-patch14-224"])
    dino = config_from_hub({"model_type": "dinov2", "image_size": 518})
    assert dino == ViTConfig(**ENCODERS["dinov2-base"])
    assert config_from_hub({"model_type": "vit_mae"}) == ViTConfig(**ENCODERS["mae-base"])


def test_a_hub_id_without_network_access_shows_how_to_fetch_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require("huggingface_hub", "hub")
    import huggingface_hub

    def offline(*args: Any, **options: Any) -> str:
        raise OSError("no route to host\ndetails")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ConversionError) as caught:
        read_encoder("google/siglip2-base-patch16-256")
    assert "no route to host" in caught.value.problem
    assert "hf download google/siglip2-base-patch16-256" in str(caught.value.remedy)
    with pytest.raises(ConversionError, match="is no hub id"):
        read_encoder("weights.safetensors")


def test_statistics_of_the_processor_are_taken_over(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    config, state = small("siglip")
    vision = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"intermediate_size": 16, "image_size": 32}
    save_file(state, tmp_path / "model.safetensors")
    record = {"model_type": "siglip", "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert read_encoder(tmp_path)[0] == config
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    assert read_encoder(tmp_path)[0].pixel_mean == (0.1, 0.2, 0.3)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConversionError, match="no config.json"):
        read_encoder(tmp_path)
