"""Runge-Kutta solvers as device loops, with torchdiffeq's definitions.

The adaptive solver is not diffrax's, which starts with another step and ends its last one at the
end of the grid: its trajectories differ from torchdiffeq's by 1e-3 to 3e-3 at rtol=1e-3, where ours
differ by 2e-5.

Source: torchdiffeq 0.2.5 (fixed_grid.py, rk_common.py, dopri5.py, misc.py); spec denoiser 6.1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsr_jax.core.typing import Array
from dsr_jax.diffusion.paths import expand

Velocity = Callable[[Array, Array], Array]
"""`(x [B, ...], t [B]) -> dx/dt [B, ...]`."""


class Tableau(NamedTuple):
    """An explicit method: stage times after the first, their couplings, final weights."""

    times: tuple[float, ...]
    couplings: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


FIXED_STEP = {
    "euler": Tableau((), (), (1.0,)),
    "midpoint": Tableau((1 / 2,), ((1 / 2,),), (0.0, 1.0)),
    "heun2": Tableau((1.0,), ((1.0,),), (1 / 2, 1 / 2)),
    "heun3": Tableau((1 / 3, 2 / 3), ((1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4)),
    # torchdiffeq's "rk4" is the 3/8 rule.
    "rk4": Tableau(
        (1 / 3, 2 / 3, 1.0),
        ((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
        (1 / 8, 3 / 8, 3 / 8, 1 / 8),
    ),
}

_DOPRI5 = Tableau(
    (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    (
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
)
_DOPRI5_ERROR = (
    35 / 384 - 1951 / 21600,
    0.0,
    500 / 1113 - 22642 / 50085,
    125 / 192 - 451 / 720,
    -2187 / 6784 + 12231 / 42400,
    11 / 84 - 649 / 6300,
    -1 / 60,
)
_DOPRI5_MIDDLE = (
    6025192743 / 30085553152 / 2,
    0.0,
    51252292925 / 65400821598 / 2,
    -2691868925 / 45128329728 / 2,
    187940372067 / 1594534317056 / 2,
    -1776094331 / 19743644256 / 2,
    11237099 / 235043384 / 2,
)
_SAFETY, _GROW, _SHRINK, _ORDER = 0.9, 10.0, 0.2, 5

MAX_ATTEMPTS = 4096
"""Steps, accepted or not, after which dopri5 gives a sample up."""


def _combine(weights: tuple[float, ...], stages: list[Array]) -> Array:
    """Returns the weighted sum of stages, without the terms whose weight is zero."""
    terms = [w * k for w, k in zip(weights, stages, strict=True) if w]
    return sum(terms[1:], terms[0])


def _stages(f: Velocity, x: Array, t: Array, dt: Array, tableau: Tableau, k1: Array) -> list[Array]:
    """Evaluates all stages of one step of size dt [B] from (x, t [B])."""
    stages, h = [k1], expand(dt, x)
    for time, coupling in zip(tableau.times, tableau.couplings, strict=True):
        stages.append(f(x + h * _combine(coupling, stages), t + time * dt))
    return stages


def fixed_step(f: Velocity, x: Array, t0: Array, t1: Array, method: str) -> Array:
    """Takes one step of a FIXED_STEP method from scalar time t0 to t1; returns the state at t1."""
    tableau = FIXED_STEP[method]
    t = jnp.broadcast_to(t0, x.shape[:1])
    dt = jnp.broadcast_to(t1 - t0, x.shape[:1])
    stages = _stages(f, x, t, dt, tableau, f(x, t))
    return x + expand(dt, x) * _combine(tableau.weights, stages)


class _AdaptiveState(NamedTuple):
    """One accepted step per sample, and the data for the next; times increase from 0.

    A sample that was given up has `end` = infinity and a state that is NaN.
    """

    x: Array  # [B, ...] at `end`
    slope: Array  # dx/ds at `end`
    start: Array  # [B]
    end: Array  # [B]
    step: Array  # [B] size of the next attempt
    attempts: Array  # [B] steps so far, accepted or not
    curve: tuple[Array, ...]  # quartic through the last accepted step


def dopri5(f: Velocity, x: Array, grid: Array, rtol: float, atol: float, error_norm: str) -> Array:
    """Integrates by adaptive Dormand-Prince 5(4), interpolated at the grid points.

    A sample whose step size falls below what its time can resolve, as after a velocity that is not
    finite, or that needs more than MAX_ATTEMPTS steps, becomes NaN from there on.

    Args:
      f: Velocity field.
      x: State [B, ...] at grid[0].
      grid: Monotone times [n].
      rtol: Relative tolerance.
      atol: Absolute tolerance.
      error_norm: "batch" measures errors over the whole batch, as torchdiffeq does, so that a
        sample's path depends on the others; "sample" gives each sample steps of its own.

    Returns:
      States [n, B, ...].
    """
    direction = jnp.sign(grid[-1] - grid[0])

    def g(y: Array, s: Array) -> Array:
        return direction * f(y, grid[0] + direction * s)

    def rms(y: Array) -> Array:
        square = jnp.mean(jnp.square(y), axis=tuple(range(1, y.ndim)))
        return jnp.sqrt(square if error_norm == "sample" else jnp.full_like(square, square.mean()))

    zeros = jnp.zeros(x.shape[:1])
    slope = g(x, zeros)
    first = _first_step(g, x, slope, rtol, atol, rms)
    attempts = jnp.zeros(x.shape[:1], jnp.int32)
    state = _AdaptiveState(x, slope, zeros, zeros, first, attempts, (x,) * 5)

    def advance(state: _AdaptiveState, target: Array) -> tuple[_AdaptiveState, Array]:
        state = jax.lax.while_loop(
            lambda s: jnp.any(target > s.end),
            lambda s: _adaptive_step(g, s, target, rtol, atol, rms),
            state,
        )
        return state, _interpolate(state, target)

    _, states = jax.lax.scan(advance, state, jnp.abs(grid[1:] - grid[0]))
    return jnp.concatenate([x[None], states])


def _first_step(
    g: Velocity, x: Array, slope: Array, rtol: float, atol: float, rms: Callable[[Array], Array]
) -> Array:
    """Returns Hairer's starting step size [B]."""
    scale = atol + jnp.abs(x) * rtol
    d0, d1 = rms(x / scale), rms(slope / scale)
    h0 = jnp.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
    next_slope = g(x + expand(h0, x) * slope, h0)
    d2 = rms((next_slope - slope) / scale) / h0
    steep = jnp.maximum(d1, d2)
    h1 = jnp.where(steep <= 1e-15, jnp.maximum(1e-6, h0 * 1e-3), (0.01 / steep) ** (1 / _ORDER))
    return jnp.minimum(100 * h0, h1)


def _adaptive_step(
    g: Velocity,
    state: _AdaptiveState,
    target: Array,
    rtol: float,
    atol: float,
    rms: Callable[[Array], Array],
) -> _AdaptiveState:
    """Attempts one step for every sample that has not reached the target, or gives it up."""
    state = _give_up(state, target)
    x, h = state.x, expand(state.step, state.x)
    stages = _stages(g, x, state.end, state.step, _DOPRI5, state.slope)
    proposed = x + h * _combine(_DOPRI5.weights, stages)
    tolerance = atol + rtol * jnp.maximum(jnp.abs(x), jnp.abs(proposed))
    error = rms(h * _combine(_DOPRI5_ERROR, stages) / tolerance)
    error = jnp.where(jnp.isnan(error), jnp.inf, error)
    active = target > state.end
    accept = active & (error <= 1)

    floor = jnp.where(error < 1, 1.0, _SHRINK)
    factor = jnp.minimum(_GROW, jnp.maximum(_SAFETY / error ** (1 / _ORDER), floor))
    factor = jnp.where(error == 0, _GROW, factor)
    middle = x + h * _combine(_DOPRI5_MIDDLE, stages)
    curve = _quartic(x, middle, proposed, h * stages[0], h * stages[-1])

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(expand(accept, new), new, old)

    return _AdaptiveState(
        choose(proposed, x),
        choose(stages[-1], state.slope),
        choose(state.end, state.start),
        choose(state.end + state.step, state.end),
        jnp.where(active, state.step * factor, state.step),
        state.attempts + active,
        tuple(choose(new, old) for new, old in zip(curve, state.curve, strict=True)),
    )


def _give_up(state: _AdaptiveState, target: Array) -> _AdaptiveState:
    """Ends the samples that will never reach the target, with a state that is NaN."""
    stuck = ~(state.end + state.step > state.end) | (state.attempts >= MAX_ATTEMPTS)
    stuck &= target > state.end
    nan = jnp.where(expand(stuck, state.x), jnp.nan, state.x)
    return state._replace(
        x=nan,
        end=jnp.where(stuck, jnp.inf, state.end),
        curve=tuple(jnp.where(expand(stuck, c), jnp.nan, c) for c in state.curve),
    )


def _quartic(y0: Array, middle: Array, y1: Array, d0: Array, d1: Array) -> tuple[Array, ...]:
    """Returns a quartic through both ends, their slopes and the middle, highest power first."""
    return (
        2 * (d1 - d0) - 8 * (y1 + y0) + 16 * middle,
        5 * d0 - 3 * d1 + 18 * y0 + 14 * y1 - 32 * middle,
        d1 - 4 * d0 - 11 * y0 - 5 * y1 + 16 * middle,
        d0,
        y0,
    )


def _interpolate(state: _AdaptiveState, target: Array) -> Array:
    """Returns the last step's quartic at the target time."""
    span = jnp.where(state.end > state.start, state.end - state.start, 1.0)
    fraction = expand((target - state.start) / span, state.x)
    value = state.curve[0]
    for coefficient in state.curve[1:]:
        value = value * fraction + coefficient
    return value
