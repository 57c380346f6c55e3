"""The training step: random inputs, accumulation, EMA, metrics, and equality across meshes."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.rng import normal_per_sample, sample_keys, stream_key, uniform_per_sample
from dsr_jax.core.trees import flatten_names
from dsr_jax.diffusion.objectives import make_objective
from dsr_jax.diffusion.time_sampling import TimeSampler
from dsr_jax.diffusion.token_weights import TokenWeights
from dsr_jax.models.dit import LightningDiT
from dsr_jax.parallel.axes import Constrain, make_rules
from dsr_jax.parallel.mesh import MeshShape, make_mesh
from dsr_jax.parallel.shardings import fetch
from dsr_jax.training.optimizers import LearningRate, Optimizer
from dsr_jax.training.state import TrainState, create_state, update_ema
from dsr_jax.training.step import split_batch
from tests.training.toy_training import (
    BATCH,
    CLASSES,
    FAST_COMPILE,
    SIZE,
    Run,
    Toy,
    host_batch,
    optimizer,
    train_step,
)


@functools.cache
def compiled(**changes: Any) -> Any:
    """The toy's step; compiled once for all tests."""
    return jax.jit(train_step(**changes), compiler_options=FAST_COMPILE)


def initial(tx: Optimizer | None = None, decays: tuple[float, ...] = (0.9,)) -> TrainState:
    example = jnp.zeros((1, SIZE, SIZE, 1)), jnp.zeros(1), jnp.zeros(1, int)
    params = jax.tree.map(
        lambda box: box.value,
        Toy().init(jax.random.key(0), *example)["params"],
        is_leaf=lambda leaf: hasattr(leaf, "names"),
    )
    return create_state(params, tx or optimizer(), decays)


def batch(step: int = 0) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.asarray, host_batch(step))


def close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    got, want = flatten_names(got), flatten_names(want)
    assert got.keys() == want.keys()
    for name, value in want.items():
        scale = np.abs(value).max() + 1e-12
        np.testing.assert_allclose(got[name] / scale, value / scale, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_equals_the_whole_batch(accumulate: int) -> None:
    whole = compiled()(initial(), batch())
    parts = compiled(accumulate=accumulate)(initial(), batch())
    close(parts, whole)


def test_micro_batches_need_no_communication() -> None:
    """Every device keeps its own rows: the only traffic is the sum of gradients and metrics."""
    run = Run(Path("unused"), MeshShape(8, 1, 1), accumulate=2)
    program = run.step.lower(run.abstract, run.batch(0)).compile().as_text()
    assert "all-reduce" in program
    for traffic in ("all-gather", "all-to-all", "collective-permute"):
        assert traffic not in program


def test_rows_are_dealt_out_in_strides() -> None:
    parts = split_batch({"label": jnp.arange(6)}, 3)["label"]
    np.testing.assert_array_equal(parts, [[0, 3], [1, 4], [2, 5]])
    with pytest.raises(ConfigError, match="global_batch=6 is no multiple of .*accumulate=4"):
        split_batch({"label": jnp.arange(6)}, 4)


def test_random_inputs_follow_the_sample_and_not_its_row() -> None:
    rows = np.random.default_rng(0).permutation(BATCH)
    shuffled = {name: value[rows] for name, value in batch().items()}
    step = compiled()
    close(step(initial(), shuffled), step(initial(), batch()))


def test_noise_differs_by_step_seed_and_sample() -> None:
    def loss(seed: int = 7, at: int = 0, shift: int = 0) -> float:
        state = initial().replace(step=jnp.int32(at))
        moved = batch() | {"index": batch()["index"] + shift}
        step = compiled() if seed == 7 else compiled(seed=seed)
        return float(step(state, moved)[1]["loss"])

    assert len({loss(), loss(seed=8), loss(at=1), loss(shift=BATCH)}) == 4


def test_loss_is_the_mean_over_the_documented_inputs() -> None:
    """Recomputes the loss from the streams that the docstring names."""
    state, data = initial(), batch()
    metrics = compiled(label_dropout=0.0)(state, data)[1]
    x0 = normal_per_sample(sample_keys(stream_key(7, "noise", 0), data["index"]), (SIZE, SIZE, 1))
    u = uniform_per_sample(sample_keys(stream_key(7, "time", 0), data["index"]))
    t = jax.nn.sigmoid(jax.scipy.special.ndtri(u) + jnp.log(2.0))  # Shift 2 of logit-normal.
    x1 = data["image"] / 127.5 - 1
    at = t[:, None, None, None]
    xt = (1 - at) * x1 + at * x0
    out = Toy().apply({"params": state.params}, xt, t, data["label"])
    losses = (((xt - out) / jnp.maximum(at, 0.05) - (x0 - x1)) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(metrics["loss"], losses.mean(), rtol=1e-5)
    early = t < 0.5
    assert 0 < metrics["bin_count"][:2].sum() == early.sum() < BATCH
    np.testing.assert_allclose(metrics["bin_loss"][:2].sum(), losses[early].sum(), rtol=1e-5)


def test_masked_tokens_have_no_loss_and_the_others_more() -> None:
    """Norms of two values: the mask leaves the tokens below the limit, weighted to mean 1."""
    limit, state, given = 2.0, initial(), batch()
    large = np.zeros((BATCH, SIZE, SIZE), bool)
    large[:, 0] = True

    def encode(variables: Any, images: jax.Array, keys: jax.Array) -> Any:
        return images * 2 - 1, jnp.where(large, 3.0, 1.0)

    weights = TokenWeights(outlier_norm=limit)
    shared: dict[str, Any] = {"tx": optimizer(), "label_dropout": 0.0, "num_time_bins": 1}
    step = train_step(encode=encode, token_weights=weights, **shared)
    _, metrics = jax.jit(step)(state, given)
    keys = [sample_keys(stream_key(7, stream, 0), given["index"]) for stream in ("time", "noise")]
    t = TimeSampler("logit-normal", shift=2.0)(uniform_per_sample(keys[0]))
    x0 = normal_per_sample(keys[1], (SIZE, SIZE, 1))
    x1 = given["image"].astype(jnp.float32) / 255 * 2 - 1
    apply = lambda x, t: Toy().apply({"params": state.params}, x, t, given["label"])  # noqa: E731
    errors = make_objective("linear", "data").loss(apply, x1, x0, t).per_element
    want = float(np.mean(np.asarray(errors)[~large]))
    assert metrics["loss"] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_label_dropout_is_a_fraction(share: float) -> None:
    metrics = compiled(label_dropout=share)(initial(), batch())[1]
    assert metrics["dropped_labels"] == share
    with pytest.raises(ConfigError, match="label_dropout=1.5"):
        train_step(label_dropout=1.5)


def test_metrics_describe_the_update() -> None:
    state = initial()
    new, metrics = compiled()(state, batch())
    squares = [np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(new.params)]
    np.testing.assert_allclose(metrics["param_norm"], np.sqrt(sum(squares)), rtol=1e-6)
    assert metrics["learning_rate"] == np.float32(1e-2)
    assert metrics["bin_count"].sum() == BATCH
    np.testing.assert_allclose(metrics["bin_loss"].sum() / BATCH, metrics["loss"], rtol=1e-5)
    assert bool(metrics["finite"]) and new.step == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_number_is_flagged(value: float) -> None:
    state = initial()
    state.params["w2"] = state.params["w2"].at[0, 0].set(value)
    assert not compiled()(state, batch())[1]["finite"]


def test_ema_weights_follow_from_the_first_step() -> None:
    state = initial(decays=(0.9, 0.0))
    start = jax.tree.map(np.asarray, state.params)
    step = compiled()
    one, _ = step(state, batch(0))
    two, _ = step(one, batch(1))
    for name in start:
        want = 0.9 * start[name] + 0.1 * one.params[name]
        np.testing.assert_allclose(one.ema["0.9"][name], want, rtol=1e-6, atol=1e-8)
        want = 0.9 * want + 0.1 * two.params[name]
        np.testing.assert_allclose(two.ema["0.9"][name], want, rtol=1e-6, atol=1e-8)
        np.testing.assert_array_equal(two.ema["0.0"][name], two.params[name])
    assert update_ema({}, start) == {}


def test_ema_weights_are_copies_that_may_be_donated() -> None:
    state = initial(decays=(0.9, 0.99))
    new, _ = jax.jit(train_step(), donate_argnums=0, compiler_options=FAST_COMPILE)(state, batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert np.isfinite(new.ema["0.99"]["w1"]).all()


@pytest.mark.parametrize("decays", [(1.0,), (-0.1,), (0.9, 0.9)])
def test_nonsense_decays_are_refused(decays: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="config.ema.decays"):
        initial(decays=decays)


MESHES = [(MeshShape(8, 1, 1), 1), (MeshShape(1, 8, 1), 1), (MeshShape(2, 2, 2), 2)]
"""Meshes, each with a number of micro-batches."""


def three_steps(run: Run, start: Any = None) -> tuple[Any, Any]:
    """Returns the first state, and what three steps from it (or from `start`) lead to."""
    state = jax.device_put(start or fetch(run.init()), run.shardings)
    first, seen = fetch(state), {}
    for step in range(3):
        state, metrics = run.step(state, run.batch(step))
        seen |= {f"{name}_{step}": metrics[name] for name in ("loss", "grad_norm")}
    return first, fetch({"params": state.params, "ema": state.ema, **seen})


# A large eps, since Adam's first steps otherwise amplify the rounding of small gradients.
EVEN = Optimizer(LearningRate(1e-2), eps=1e-3, clip_norm=1.0)


def test_meshes_agree(tmp_path: Path) -> None:
    runs = [Run(tmp_path, shape, tx=EVEN, accumulate=micro) for shape, micro in MESHES]
    start, want = three_steps(runs[0])
    assert want["loss_0"] != want["loss_2"]
    for run in runs[1:]:
        close(three_steps(run, start)[1], want)


@pytest.mark.slow
def test_meshes_agree_on_a_transformer_with_registers(tmp_path: Path) -> None:
    def run(shape: MeshShape, micro: int) -> Run:
        model = LightningDiT(
            input_size=SIZE, in_channels=1, hidden_size=32, depth=3, num_heads=2,
            num_classes=CLASSES, num_registers=4, register_start=1,
            constrain=Constrain(make_rules("fsdp"), make_mesh(shape)),
        )  # fmt: skip
        return Run(tmp_path, shape, model, tx=EVEN, accumulate=micro)

    runs = [run(shape, micro) for shape, micro in MESHES]
    start, want = three_steps(runs[0])
    assert np.abs(want["params"]["final_layer"]["linear"]["kernel"]).max() > 1e-3
    for other in runs[1:]:
        close(three_steps(other, start)[1], want, tolerance=2e-5)
