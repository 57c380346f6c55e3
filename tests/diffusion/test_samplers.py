"""Samplers on data whose flow is known: x1 normal with variance s^2, so that x_t is normal too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.diffusion.objectives import make_objective
from dsr_jax.diffusion.samplers import ODE_METHODS, sample_ode, sample_sde, time_grid
from dsr_jax.diffusion.time_sampling import shift_time

STD = 0.4


def variance(t: jax.Array) -> jax.Array:
    return (1 - t) ** 2 * STD**2 + t**2


def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
    """Of the linear path between N(0, STD^2) and N(0, 1): x * d/dt log std(x_t)."""
    slope = t - (1 - t) * STD**2
    return x * (slope / variance(t)).reshape(-1, 1, 1, 1)


def start(batch: int = 4) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (batch, 2, 2, 1))


def error(method: str, points: int) -> float:
    grid = 1 - jnp.linspace(0.0, 1.0, points)
    out = sample_ode(velocity, start(), grid, method)
    return float(jnp.abs(out - STD * start()).max())


@pytest.mark.parametrize(
    ("method", "order"), [("euler", 1), ("midpoint", 2), ("heun2", 2), ("heun3", 3), ("rk4", 4)]
)
def test_solvers_converge_with_their_order(method: str, order: int) -> None:
    # Few points for high orders: float32 soon hides their error.
    coarse, fine = (3, 5) if order > 2 else (17, 33)
    rate = np.log2(error(method, coarse) / error(method, fine))
    assert order - 0.6 < rate < order + 1.5


def test_dopri5_meets_its_tolerance_at_every_grid_point() -> None:
    grid = 1 - jnp.linspace(0.0, 1.0, 6)
    states = sample_ode(
        velocity, start(), grid, "dopri5", rtol=1e-5, atol=1e-6, return_trajectory=True
    )
    exact = start() * jnp.sqrt(variance(grid)).reshape(-1, 1, 1, 1, 1)
    np.testing.assert_allclose(states, exact, atol=2e-4)


def test_dopri5_steps_are_a_samples_own() -> None:
    """With a norm per sample, a difficult one changes no other; with the batch's it does."""

    def field(x: jax.Array, t: jax.Array) -> jax.Array:
        rate = jnp.where(jnp.arange(x.shape[0]) == 0, 1.0, 20.0).reshape(-1, 1, 1, 1)
        return -rate * jnp.sin(rate * x) * t.reshape(-1, 1, 1, 1)

    grid = jnp.array([1.0, 0.0])
    alone = sample_ode(field, start(1), grid, "dopri5")
    for norm, same in (("sample", True), ("batch", False)):
        mixed = sample_ode(field, start(2).at[:1].set(start(1)), grid, "dopri5", error_norm=norm)
        assert bool(jnp.all(mixed[:1] == alone)) is same


@pytest.mark.parametrize("norm", ["sample", "batch"])
def test_dopri5_ends_where_the_velocity_is_not_finite(norm: str) -> None:
    """Sample 0 meets a NaN half way; with steps of their own, the others are not touched."""

    def field(x: jax.Array, t: jax.Array) -> jax.Array:
        broken = (jnp.arange(x.shape[0]) == 0) & (t < 0.5)
        return jnp.where(broken.reshape(-1, 1, 1, 1), jnp.nan, velocity(x, t))

    grid = 1 - jnp.linspace(0.0, 1.0, 5)
    states = sample_ode(field, start(), grid, "dopri5", error_norm=norm, return_trajectory=True)
    finite = np.isfinite(states).all(axis=(2, 3, 4))
    assert finite[:2].all() and not finite[-1, 0]
    assert finite[:, 1:].all() == (norm == "sample")
    everywhere = sample_ode(lambda x, t: jnp.full_like(x, jnp.nan), start(), grid, "dopri5")
    assert np.isnan(everywhere).all()


def test_dopri5_has_a_limit_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsr_jax.diffusion.solvers.MAX_ATTEMPTS", 3)
    grid = jnp.array([1.0, 0.0])
    assert np.isnan(sample_ode(velocity, start(), grid, "dopri5", rtol=1e-6, atol=1e-7)).all()
    assert np.isfinite(sample_ode(velocity, start(), grid, "euler")).all()


@pytest.mark.parametrize("points", [2, 3, 6])
def test_the_last_step_may_be_eulers(points: int) -> None:
    """Which never asks for a velocity at the data's end."""
    grid = 1 - jnp.linspace(0.0, 1.0, points)
    unending = lambda x, t: velocity(x, t) / (t > 0).reshape(-1, 1, 1, 1)  # noqa: E731
    states = sample_ode(unending, start(), grid, "heun-euler", return_trajectory=True)
    heun = sample_ode(velocity, start(), grid, "heun", return_trajectory=True)
    np.testing.assert_allclose(states[:-1], heun[:-1], rtol=1e-6)
    last = sample_ode(velocity, heun[-2], grid[-2:], "euler")
    np.testing.assert_allclose(states[-1], last, rtol=1e-5)
    assert not np.isfinite(sample_ode(unending, start(), grid, "heun")).any()


@pytest.mark.parametrize("method", ODE_METHODS)
def test_trajectories_begin_with_noise_and_end_with_the_sample(method: str) -> None:
    grid = time_grid(4, "linear", "data", 3.0)
    states = sample_ode(velocity, start(), grid, method, return_trajectory=True)
    assert states.shape == (4, *start().shape)
    np.testing.assert_array_equal(states[0], start())
    np.testing.assert_allclose(states[-1], sample_ode(velocity, start(), grid, method), rtol=1e-6)


@pytest.mark.parametrize("form", ["sigma", "linear", "constant", "increasing-decreasing"])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_sde_keeps_the_marginal_variance(form: str, method: str) -> None:
    noise = jax.random.normal(jax.random.key(1), (8192, 1, 1, 1))
    grid = time_grid(401, "linear", "velocity", last_step=0.04)
    key = jax.random.key(2)
    states = sample_sde(
        velocity,
        make_objective("linear", "velocity"),
        noise,
        grid,
        lambda index: jax.random.normal(jax.random.fold_in(key, index), noise.shape),
        method=method,
        form=form,
        norm=0.5,
        return_trajectory=True,
    )
    # Before the last step, which adds no noise, the state has the path's own variance.
    expected = np.sqrt(variance(0.04))
    assert float(states[-2].std()) == pytest.approx(expected, rel=0.03)


def test_grid_is_shifted_and_ends_as_documented() -> None:
    grid = time_grid(50, "linear", "data", np.sqrt(48))
    assert grid[0] == 1 and grid[-1] == 0 and len(grid) == 50
    np.testing.assert_allclose(grid[1:4], [0.997002, 0.993895, 0.990674], atol=2e-6)
    whole = time_grid(5, "linear", "velocity", time_range=(0.0, 1.0))
    np.testing.assert_array_equal(whole, [1, 0.75, 0.5, 0.25, 0])
    assert float(time_grid(5, "linear", "velocity", np.sqrt(48))[-1]) == pytest.approx(
        float(shift_time(jnp.asarray(0.001), np.sqrt(48))), rel=1e-4
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: time_grid(1, "linear", "data"), "num_points=1"),
        (lambda: time_grid(5, "linear", "data", 0.5), "time_shift=0.5"),
        (lambda: sample_ode(velocity, start(), jnp.ones(2), "rk5"), "method='rk5'.*\n.*dopri5"),
        (
            lambda: sample_ode(velocity, start(), jnp.ones(2), "dopri5", error_norm="max"),
            "error norm 'max'",
        ),
    ],
)
def test_bad_settings_are_named(call: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "Euler"}, "SDE method 'Euler'"),
        ({"form": "SBDM"}, "negative or infinite"),
        ({"form": "cubic"}, "form 'cubic'"),
        ({"last_step": "maximum"}, "last step 'maximum'"),
        ({"method": "heun", "last_step": "none"}, "diverges"),
    ],
)
def test_unusable_sde_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sample_sde(
            velocity,
            make_objective("linear", "velocity"),
            start(),
            time_grid(3, "linear", "velocity", last_step=0.04),
            lambda index: start(),
            **settings,
        )
