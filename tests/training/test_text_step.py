"""The joint step: whole-batch means in micro-batches and on a mesh, groups, frozen and dropped."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsr_jax.build.text_to_image import make_text_denoise_fn, make_text_model
from dsr_jax.core.errors import ConfigError
from dsr_jax.core.prompts import IGNORED, IMAGE_SLOT
from dsr_jax.diffusion.objectives import make_objective
from dsr_jax.diffusion.time_sampling import make_time_sampler
from dsr_jax.models.dit import LightningDiT
from dsr_jax.models.language import LanguageModel
from dsr_jax.models.text_to_image import TextToImage, initial_inputs
from dsr_jax.parallel.mesh import MeshShape, make_mesh
from dsr_jax.training.optimizers import LearningRate, Optimizer, ParamGroup
from dsr_jax.training.state import create_state
from dsr_jax.training.text_step import TextStep


def _model():
    language = LanguageModel(
        vocab_size=11, hidden_size=8, depth=1, num_heads=2, num_kv_heads=1, mlp_dim=8
    )
    shared = {"input_size": 2, "in_channels": 3, "num_classes": 1}
    denoiser = LightningDiT(
        **shared,
        hidden_size=16,
        depth=2,
        num_heads=2,
        condition_width=16,
        num_registers=4,
        register_start=1,
    )
    return TextToImage(
        **shared, language=language, denoiser=denoiser, understanding=True, text_length=10
    )


def _batch(size=8):
    """Prompts of different lengths; every fourth sample shows an image instead."""
    rng = np.random.default_rng(0)
    tokens = np.zeros((size, 10), np.int32)
    targets = np.full((size, 10), IGNORED, np.int32)
    for row in range(size):
        words = 1 + row % 3
        tokens[row, :words] = rng.integers(3, 11, words)
        tokens[row, words : words + 6] = [1, *[IMAGE_SLOT] * 4, 2]
        answer = row % 4 != 3
        targets[row, words] = 1 if answer else IGNORED
        targets[row, words + 5] = 2
    images = rng.random((size, 2, 2, 3)).astype(np.float32)
    index = np.arange(size, dtype=np.uint32)
    return {
        "image": jnp.asarray(images),
        "tokens": jnp.asarray(tokens),
        "targets": jnp.asarray(targets),
        "index": jnp.asarray(index),
    }


GROUP = ParamGroup(("language", "queries", "project"), 0.1, 0.9, 0.999)


@pytest.fixture(scope="module")
def setup():
    model = _model()
    shapes = nn.unbox(
        jax.eval_shape(model.init, jax.random.key(0), *initial_inputs(model, (2, 2, 3)))
    )
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), shapes["params"]
    )
    optimizer = Optimizer(LearningRate(1e-2), groups=(GROUP,), clip_norm=1.0)
    step = TextStep(
        make_text_denoise_fn(model),
        lambda variables, images, keys: images,
        make_objective("linear", "velocity"),
        make_time_sampler("logit-normal_0_1", "linear", "velocity", 2.0, (0.0, 1.0)),
        optimizer,
        seed=3,
        null_label=0,
        label_dropout=0.25,
        model=make_text_model(model),
        max_targets=3,
    )
    return step, jax.jit(lambda params: create_state(params, optimizer, (0.9,)))(params)


@pytest.fixture(scope="module")
def plain(setup):
    step, state = setup
    return jax.jit(step)(state, _batch())


def _assert_close(got, want, tolerance=2e-4):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want
    )


@pytest.mark.slow
def test_micro_batches_have_the_gradients_of_the_whole_batch(setup, plain):
    step, state = setup
    after, metrics = jax.jit(dataclasses.replace(step, accumulate=4))(state, _batch())
    _assert_close(after.params, plain[0].params)
    _assert_close(metrics, plain[1])


@pytest.mark.slow
def test_a_mesh_changes_nothing(setup, plain):
    step, state = setup
    mesh = make_mesh(MeshShape(data=2, fsdp=2), jax.devices()[:4])
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    after, metrics = jax.jit(step)(state, jax.device_put(_batch(), rows))
    _assert_close(jax.device_get(after.params), jax.device_get(plain[0].params))
    _assert_close(jax.device_get(metrics), jax.device_get(plain[1]))


@pytest.mark.slow
def test_metrics_are_means_over_answers_and_supervised_tokens(setup, plain):
    metrics = plain[1]
    assert metrics["answer_images"] == 6 and metrics["supervised_tokens"] == 14
    assert metrics["bin_count"].sum() == 6
    want = metrics["language_loss"] + 2 * metrics["diffusion_loss"]
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-6)
    assert metrics["finite"]


@pytest.mark.slow
def test_several_times_are_a_mean_over_them(setup, plain):
    step, state = setup
    metrics = jax.device_get(jax.jit(dataclasses.replace(step, times=3))(state, _batch())[1])
    once = jax.device_get(plain[1])
    assert metrics["bin_count"].sum() == 18 and metrics["answer_images"] == 6
    assert metrics["language_loss"] == pytest.approx(once["language_loss"], rel=1e-5)
    mean = metrics["bin_loss"].sum() / 18
    assert metrics["diffusion_loss"] == pytest.approx(mean, rel=1e-4)
    assert mean != pytest.approx(once["diffusion_loss"], rel=1e-3)
    assert metrics["finite"]


@pytest.mark.slow
def test_a_frozen_language_model_stays_and_dropped_text_does_not_count(setup):
    step, state = setup
    frozen = dataclasses.replace(step.optimizer, freeze=("language",))
    still = dataclasses.replace(step, optimizer=frozen, language_weight=0.0, label_dropout=1.0)
    run, state = jax.jit(still), create_state(state.params, frozen, (0.9,))
    assert "language" not in optax.tree.get(state.opt_state, "mu")
    after, metrics = run(state, _batch())
    jax.tree.map(np.testing.assert_array_equal, after.params["language"], state.params["language"])
    assert not np.array_equal(
        after.params["denoiser"]["pos_embed"], state.params["denoiser"]["pos_embed"]
    )
    # The caption has no effect where every text is dropped.
    words = _batch() | {"tokens": jnp.where(_batch()["tokens"] > 2, 5, _batch()["tokens"])}
    assert float(run(state, words)[1]["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    assert metrics["dropped_labels"] == 1


@pytest.mark.slow
def test_groups_have_their_own_rate(setup, plain):
    _, state = setup
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), plain[0].params, state.params)
    # Adam's first step is the rate itself.
    assert moved["queries"] == pytest.approx(1e-3, rel=1e-2)
    assert moved["connect"]["fc0"]["kernel"] == pytest.approx(1e-2, rel=1e-2)


def test_errors_name_the_setting(setup):
    step, state = setup
    with pytest.raises(ConfigError, match="language_weight=0.0, diffusion_weight=0.0"):
        dataclasses.replace(step, language_weight=0.0, diffusion_weight=0.0)
    wrong = Optimizer(LearningRate(1e-2), groups=(ParamGroup(("lm",), 0.1, 0.9, 0.999),))
    with pytest.raises(ConfigError, match="groups: 'lm' matches no parameter"):
        wrong.apply(state.params, wrong.init(state.params), state.params, jnp.zeros((), jnp.int32))
    with pytest.raises(ConfigError, match="config.optim.groups holds"):
        Optimizer(LearningRate(1e-2), groups=(ParamGroup("language", 0.1, 0.9, 0.999),))
