"""Conversion of Qwen2 and Scale-RAE folders: shards, both ways, strict, tied heads."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsr_jax.convert.__main__ import main
from dsr_jax.convert.files import load_converted
from dsr_jax.convert.qwen2 import model_of_config, resize_vocabulary
from dsr_jax.convert.rules import flax_to_torch
from dsr_jax.convert.scale_rae import rope_buffers, scale_rae_rules
from dsr_jax.convert.text_models import text_model_of_record
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.trees import unflatten_names
from dsr_jax.models.dit import LightningDiT
from dsr_jax.models.dit_dh import DiTDH
from dsr_jax.models.embeddings import sincos_2d
from dsr_jax.models.language import LanguageModel
from dsr_jax.models.text_to_image import TextToImage

CONFIG = {
    "vocab_size": 13,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 12,
    "tie_word_embeddings": True,
}
SHARED = {"input_size": 2, "in_channels": 3, "num_classes": 1}
DIT = LightningDiT(**SHARED, hidden_size=16, depth=2, num_heads=2, condition_width=12)
HEAD = DiTDH(
    **SHARED,
    hidden_size=16,
    depth=2,
    num_heads=2,
    condition_width=12,
    decoder_hidden_size=24,
    decoder_depth=1,
    decoder_num_heads=3,
)


def _scale_rae(denoiser=DIT, **changes):
    language = LanguageModel(13, 8, 2, 2, 1, 12)
    model = TextToImage(
        **SHARED, language=language, denoiser=denoiser, understanding=True, **changes
    )
    rules, rng = scale_rae_rules(model), np.random.default_rng(0)
    flat = {name: rng.normal(size=shape).astype(np.float32) for name, shape in rules.shapes.items()}
    flat["denoiser/pos_embed"] = sincos_2d(16, 2)[None].astype(np.float32)
    return flax_to_torch(unflatten_names(flat), rules) | rope_buffers(denoiser)


def _write(folder, state, shards=2, **config):
    """Writes a snapshot folder with an index of shards, as transformers does."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    names, index = sorted(state), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: np.ascontiguousarray(state[name]) for name in names[i::shards]}
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def _convert(family, source, out, *options):
    main([family, "--source", str(source), "--out", str(out), *options])
    back = out.with_suffix(".safetensors")
    main(["export", "--source", str(out), "--out", str(back)])
    return load_file(back)


def _assert_equal(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("denoiser", "changes"), [(DIT, {}), (HEAD, {"connector": "mlp2"})], ids=["dit", "head"]
)
def test_scale_rae_shards_round_trip(tmp_path, denoiser, changes):
    state = _scale_rae(denoiser, **changes)
    tied = state | {"lm_head.weight": state["model.embed_tokens.weight"]}
    _assert_equal(_convert("scale_rae", _write(tmp_path / "in", tied), tmp_path / "out"), state)
    model = text_model_of_record(load_converted(tmp_path / "out")[1])
    assert model.denoiser == denoiser and model.understanding
    assert model.connector == changes.get("connector", "linear")


@pytest.mark.slow
def test_qwen2_shards_of_transformers_round_trip(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(**{**CONFIG, "tie_word_embeddings": False})
    network = transformers.Qwen2ForCausalLM(config)
    network.save_pretrained(tmp_path / "in", max_shard_size="2KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    want = {name: value.detach().numpy() for name, value in network.state_dict().items()}
    _assert_equal(_convert("qwen2", tmp_path / "in", tmp_path / "out"), want)


@pytest.mark.parametrize("keys", [{}, {"rope_theta": 1e6}, {"rope_theta": 1e4}])
def test_the_rotary_base_is_that_of_transformers(keys):
    transformers = pytest.importorskip("transformers")
    want = transformers.Qwen2Config(**CONFIG, **keys).rope_parameters["rope_theta"]
    assert model_of_config({**CONFIG, **keys}).rope_theta == want
    nested = {"rope_parameters": {"rope_type": "default", **keys}}
    assert model_of_config({**CONFIG, **nested}).rope_theta == want


def test_tied_qwen2_round_trips_without_its_head(tmp_path):
    state = {k: v for k, v in _scale_rae().items() if k.startswith("model.layers")}
    state |= {"model.norm.weight": np.ones(8, np.float32)}
    state |= {"model.embed_tokens.weight": np.ones((13, 8), np.float32)}
    _assert_equal(_convert("qwen2", _write(tmp_path / "in", state), tmp_path / "out"), state)


def test_missing_extra_and_untied_tensors_are_named(tmp_path):
    state = _scale_rae()
    cases = {
        "missing": (
            {k: v for k, v in state.items() if k != "model.norm.weight"},
            "missing.*\n.*model.norm.weight",
        ),
        "extra": (state | {"vision_tower.x": np.ones(1, np.float32)}, "--drop 'vision_tower"),
        "statistics": (state | {"diff_head.data_mean": np.ones(1, np.float32)}, "data_mean"),
        "untied": (state | {"lm_head.weight": np.ones((13, 8), np.float32)}, "lm_head.weight diff"),
        "positions": (
            state | {"diff_head.model.pos_embed": np.ones((1, 4, 16), np.float32)},
            "pos_embed differs from the sine-cosine table",
        ),
        "shape": (state | {"model.latent_queries": np.ones((5, 8), np.float32)}, r"\[5, 8\]"),
    }
    for name, (wrong, message) in cases.items():
        source = _write(tmp_path / name, wrong)
        with pytest.raises(ConversionError, match=message):
            main(["scale_rae", "--source", str(source), "--out", str(tmp_path / f"{name}-out")])
    source = _write(tmp_path / "sliding", state, use_sliding_window=True)
    with pytest.raises(ConversionError, match="use_sliding_window=True"):
        main(["scale_rae", "--source", str(source), "--out", str(tmp_path / "sliding-out")])
    # As transformers 5 writes what was rope_scaling.
    source = _write(tmp_path / "yarn", state, rope_parameters={"rope_type": "yarn", "factor": 4.0})
    with pytest.raises(ConversionError, match="rope_type='yarn'"):
        main(["scale_rae", "--source", str(source), "--out", str(tmp_path / "yarn-out")])
    with pytest.raises(ConversionError, match="not Qwen2"):
        main(["qwen2", "--source", str(tmp_path / "missing"), "--out", str(tmp_path / "q")])


def test_a_denoiser_with_registers_is_not_exported(tmp_path):
    from dsr_jax.convert.text_models import export_text_model
    from dsr_jax.models.registry import model_sizes

    registers = DIT.clone(num_registers=4, register_start=1)
    language = LanguageModel(13, 8, 2, 2, 1, 12)
    model = TextToImage(**SHARED, language=language, denoiser=registers)
    with pytest.raises(ConversionError, match="has no registers"):
        export_text_model({}, {"family": "scale_rae", "model": model_sizes(model)})


def test_new_words_start_at_the_mean_of_the_others():
    table = np.arange(12, dtype=np.float32).reshape(6, 2)
    params = {"embed": {"embedding": table}, "head": {"kernel": table.T}}
    for rows in (5, 8):
        resized = resize_vocabulary(params, rows, first_new=4)
        got = resized["embed"]["embedding"]
        np.testing.assert_array_equal(got[:4], table[:4])
        np.testing.assert_array_equal(got[4:], np.tile([[3.0, 4.0]], (rows - 4, 1)))
        np.testing.assert_array_equal(resized["head"]["kernel"], got.T)
    with pytest.raises(ConversionError, match="own words take 7"):
        resize_vocabulary(params, 8, first_new=7)
    assert jax.tree.leaves(params)[0] is table
