"""Paths, predictions and their conversions fit each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.diffusion.objectives import PREDICTIONS, bin_losses, make_objective
from dsr_jax.diffusion.paths import flip_time, get_path

NAMES = ("linear", "gvp", "vp-consistent")
T = jnp.array([0.1, 0.4, 0.9])


def batch(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(seed))
    return tuple(jax.random.normal(key, (3, 4, 4, 2)) for key in keys)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_are_those_of_the_coefficients(name: str) -> None:
    path = get_path(name)
    for value, slope in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        _, derivative = jax.jvp(value, (T,), (jnp.ones_like(T),))
        np.testing.assert_allclose(slope(T), derivative, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_ends_are_data_and_noise(name: str) -> None:
    path, (x1, x0) = get_path(name), batch()
    near = 1e-2 if name.startswith("vp") else 1e-6
    np.testing.assert_allclose(path.interpolate(x1, x0, jnp.zeros(3))[0], x1, atol=5 * near)
    np.testing.assert_allclose(path.interpolate(x1, x0, jnp.ones(3))[0], x0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_perfect_predictions_give_the_true_velocity_and_score(name: str, prediction: str) -> None:
    """Given what was mixed, every prediction's conversions must agree."""
    path, (x1, x0) = get_path(name), batch()
    # Where sigma exceeds the floor under which a data prediction is not exact.
    t = jnp.array([0.5, 0.7, 0.9]) if name.startswith("vp") else T
    xt, ut = path.interpolate(x1, x0, t)
    sigma = path.sigma(t)[:, None, None, None]
    perfect = {"velocity": ut, "data": x1, "noise": x0, "score": -x0 / sigma}[prediction]
    objective = make_objective(name, prediction)
    np.testing.assert_allclose(objective.velocity(perfect, xt, t), ut, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(objective.score(perfect, xt, t), -x0 / sigma, rtol=2e-3, atol=2e-2)
    np.testing.assert_allclose(objective.data(perfect, xt, t), x1, rtol=2e-3, atol=2e-3)
    terms = objective.loss(lambda x, t: perfect, x1, x0, t)
    np.testing.assert_allclose(terms.loss, 0, atol=1e-4)


def test_data_loss_is_the_weighted_data_error_above_the_floor() -> None:
    x1, x0 = batch()
    out = x1 + 0.1
    loss = make_objective("linear", "data").loss(lambda x, t: out, x1, x0, T).loss
    np.testing.assert_allclose(loss, 0.01 / T**2, rtol=1e-3)


def test_below_the_floor_the_target_keeps_its_own_denominator() -> None:
    x1, x0 = batch()
    t = jnp.full(3, 0.01)
    objective = make_objective("linear", "data")
    xt, ut = get_path("linear").interpolate(x1, x0, t)
    best = xt - 0.05 * ut
    assert objective.loss(lambda x, t: best, x1, x0, t).loss.max() < 1e-8
    assert objective.loss(lambda x, t: x1, x1, x0, t).loss.min() > 0.1


def test_with_a_clipped_target_the_data_is_best_at_every_time() -> None:
    x1, x0 = batch()
    t = jnp.array([0.01, 0.3, 0.9])
    objective = make_objective("linear", "data", clip_target=True)
    assert objective.loss(lambda x, t: x1, x1, x0, t).loss.max() == 0
    loss = objective.loss(lambda x, t: x1 + 0.1, x1, x0, t).loss
    np.testing.assert_allclose(loss, 0.01 / jnp.maximum(t, 0.05) ** 2, rtol=1e-3)
    with pytest.raises(ConfigError, match="clip_target has no effect on velocity"):
        make_objective("linear", "velocity", clip_target=True)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["linear", "gvp", "vp-consistent"])
def test_a_noise_scale_is_part_of_the_path(name: str, prediction: str) -> None:
    """What is mixed, predicted and converted is that of noise with this standard deviation."""
    x1, x0 = batch()
    t = jnp.array([0.5, 0.7, 0.9])
    objective = make_objective(name, prediction, noise_scale=2.0)
    assert objective.path.noise_scale == 2
    xt, ut = objective.path.interpolate(x1, x0, t)
    want, slope = get_path(name).interpolate(x1, 2 * x0, t)
    np.testing.assert_allclose(xt, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ut, slope, rtol=1e-5, atol=1e-6)
    sigma = objective.path.sigma(t)[:, None, None, None]
    perfect = {"velocity": ut, "data": x1, "noise": x0, "score": -x0 / sigma}[prediction]
    np.testing.assert_allclose(objective.velocity(perfect, xt, t), ut, rtol=2e-3, atol=4e-3)
    np.testing.assert_allclose(objective.score(perfect, xt, t), -x0 / sigma, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize(("name", "scale"), [("linear", 0.0), ("linear", -1.0), ("vp", 2.0)])
def test_impossible_noise_scales_are_named(name: str, scale: float) -> None:
    with pytest.raises(ConfigError, match=f"noise_scale={scale} on the path '{name}'"):
        make_objective(name, "data", noise_scale=scale)


def test_weights_scale_noise_losses() -> None:
    x1, x0 = batch()
    plain, weighted = (
        make_objective("gvp", "noise", weight).loss(lambda x, t: x, x1, x0, T).loss
        for weight in ("", "velocity")
    )
    path = get_path("gvp")
    factor = (path.drift(x1, T)[1].reshape(3) / path.sigma(T)) ** 2
    np.testing.assert_allclose(weighted, factor * plain, rtol=1e-4)


def test_flipping_time_twice_is_nothing() -> None:
    field = lambda x, t: x * t.reshape(-1, 1, 1, 1)  # noqa: E731
    x, _ = batch()
    flipped = flip_time(field)
    np.testing.assert_allclose(flipped(x, T), -field(x, 1 - T))
    np.testing.assert_allclose(flip_time(flipped)(x, T), field(x, T), rtol=1e-5)
    for prediction in ("data", "noise", "score"):
        np.testing.assert_allclose(flip_time(field, prediction)(x, T), field(x, 1 - T))


def test_time_bins_count_every_sample_once() -> None:
    t = jnp.array([0.0, 0.1, 0.26, 0.5, 1.0])
    sums, counts = bin_losses(jnp.arange(1.0, 6.0), t, 4)
    np.testing.assert_array_equal(counts, [2, 1, 1, 1])
    np.testing.assert_array_equal(sums, [3, 3, 4, 5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cubic", "data"), "path='cubic'.*\n.*linear"),
        (("linear", "x0"), "prediction='x0'.*\n.*velocity"),
        (("linear", "noise", "snr"), "loss_weight='snr'"),
        (("linear", "data", "velocity"), "no effect on data"),
    ],
)
def test_unknown_names_raise(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_objective(*arguments)
