"""A converted language model as the start of a run of text."""

import jax
import numpy as np
import pytest

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.build.prompts import make_prompt_tokenizer
from dsr_jax.convert.files import save_converted
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.trees import flatten_names, unflatten_names
from dsr_jax.models.registry import model_sizes
from tests.qwen_tokenizer import write_folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A config, its model, and a folder of a language model with eight rows more."""
    pytest.importorskip("transformers")
    tokenizer = write_folder(tmp_path_factory.mktemp("tokenizer"))
    config = configs.load("configs/shapes_t2i.py:runlocal")
    rows = make_prompt_tokenizer(str(tokenizer)).vocab_size
    config.language.tokenizer, config.language.vocab_size = str(tokenizer), rows
    space, _ = build.make_space(config)
    model, optimizer = build.make_model(config, space), build.make_optimizer(config)
    mesh, rules = build.make_mesh(config, jax.devices()[:1]), build.make_rules(config)
    abstract, init = build.make_state(config, model, space, optimizer, mesh, rules)
    rng, flat = np.random.default_rng(0), {}
    for name, leaf in flatten_names(abstract.params["language"]).items():
        shape = (rows + 8, *leaf.shape[1:]) if name == "embed/embedding" else leaf.shape
        flat[name] = rng.normal(size=shape).astype(np.float32)
    return config, model.language, flat, (init, optimizer, abstract)


def _start(parts, folder, family="qwen2", **changes):
    config, language, flat, rest = parts
    sizes = model_sizes(language.clone(vocab_size=len(flat["embed/embedding"]))) | changes
    save_converted(folder, unflatten_names(flat), {"family": family, "model": sizes})
    config = config.copy_and_resolve_references()
    config.language.init_from = str(folder)
    return build.start_from_language(config, *rest)


@pytest.mark.slow
def test_a_run_starts_from_a_converted_language_model(parts, tmp_path):
    config, _, flat, (init, _, _) = parts
    state, random = _start(parts, tmp_path / "model")(), init()
    rows = config.language.vocab_size
    table = np.asarray(state.params["language"]["embed"]["embedding"])
    np.testing.assert_array_equal(table[: rows - 2], flat["embed/embedding"][: rows - 2])
    mean = flat["embed/embedding"][: rows - 2].mean(axis=0)
    np.testing.assert_allclose(table[rows - 2 :], np.tile(mean, (2, 1)), atol=1e-6)
    for name, leaf in flatten_names(state.params).items():
        below = name.removeprefix("language/")
        if below == "embed/embedding":
            continue
        want = flat[below] if below != name else flatten_names(random.params)[name]
        np.testing.assert_array_equal(leaf, want, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, state.ema["0.998"], state.params)


def test_what_cannot_be_started_from_is_named(parts, tmp_path):
    for number, (family, changes, problem) in enumerate(
        (
            ("clip", {}, "holds a clip"),
            ("qwen2", {"rope_theta": 1e4}, "rope_theta=10000; a run's has 1e"),
            ("qwen2", {"epsilon": 1e-5}, "epsilon=1e-05"),
        )
    ):
        with pytest.raises(ConversionError, match=problem):
            _start(parts, tmp_path / str(number), family, **changes)
    wrong = {**parts[2], "norm/scale": np.ones(3, np.float32)}
    with pytest.raises(ConversionError, match=r"norm/scale: \(3,\) -> \(16,\)"):
        _start((*parts[:2], wrong, parts[3]), tmp_path / "sizes")


def test_converted_settings_that_no_shape_shows_are_compared(tmp_path):
    config = configs.load("configs/shapes_t2i.py:runlocal")
    mesh, rules = build.make_mesh(config, jax.devices()[:1]), build.make_rules(config)
    space, _ = build.make_space(config)
    model = build.make_model(config, space)
    abstract = build.abstract_params(model, space, mesh, rules)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract)
    save_converted(tmp_path / "own", params, {"family": "scale_rae", "model": model_sizes(model)})
    build.restore_converted(str(tmp_path / "own"), model, abstract)
    for key, value, problem in (
        ("model.condition_silu", False, "model.condition_silu: True -> False"),
        ("registers.condition", "time", "registers.condition: mean -> time"),
    ):
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict({key: value})
        with pytest.raises(ConversionError, match=problem):
            build.restore_converted(str(tmp_path / "own"), build.make_model(other, space), abstract)
    sizes = model_sizes(model)
    sizes["language"] = {**sizes["language"], "rope_theta": 1e4}
    save_converted(tmp_path / "base", params, {"family": "scale_rae", "model": sizes})
    with pytest.raises(ConversionError, match="language.rope_theta: 10000.0 -> 1000000.0"):
        build.restore_converted(str(tmp_path / "base"), model, abstract)
