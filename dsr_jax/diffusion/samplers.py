"""Time grids, and ODE and SDE samplers as scans on the device.

Source: DSR stage2/transport/{transport,integrators}.py; spec denoiser 6.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.plugins import is_reference, load_object
from dsr_jax.core.typing import Array
from dsr_jax.diffusion import solvers
from dsr_jax.diffusion.objectives import Objective
from dsr_jax.diffusion.paths import DIFFUSION_FORMS, expand
from dsr_jax.diffusion.solvers import Velocity
from dsr_jax.diffusion.time_sampling import choose_range, shift_time, time_support

HEUN_THEN_EULER = "heun-euler"
ODE_METHODS = (*solvers.FIXED_STEP, HEUN_THEN_EULER, "dopri5")
SDE_METHODS = ("euler", "heun")
LAST_STEPS = ("mean", "euler", "tweedie", "none")


class SolverOptions(NamedTuple):
    """Settings of the solvers; see `sample_ode` and `sample_sde`."""

    rtol: float = 1e-3
    atol: float = 1e-6
    sde_form: str = "sigma"
    sde_norm: float = 1.0
    last_step: str = "mean"
    last_step_size: float = 0.04


@dataclass(frozen=True)
class SamplingProblem:
    """Problem that a sampler solves: from noise at grid[0] to a sample at grid[-1].

    Attributes:
      predict: The network with its guidance, `(x [B, ...], t [B]) -> out`.
      objective: Turns its output into velocities, scores and data.
      noise: State [B, ...] at grid[0].
      grid: Decreasing times [n], 1 is noise and 0 data.
      step_noise: Standard normals [B, ...] for a step's index 0..n-2, the same for a sample in
        whatever batch it is.
      options: Settings of the solvers.
    """

    predict: Velocity
    objective: Objective
    noise: Array
    grid: Array
    step_noise: Callable[[Array], Array]
    options: SolverOptions = field(default_factory=SolverOptions)

    def velocity(self, x: Array, t: Array) -> Array:
        """Returns the probability flow's dx/dt at (x [B, ...], t [B])."""
        return self.objective.velocity(self.predict(x, t), x, t)


@dataclass(frozen=True)
class Sampler:
    """Method of solving a `SamplingProblem`, selected by config.sample.method.

    Attributes:
      run: Returns the sample [B, ...].
      options: Fields of SolverOptions that it reads: those that a recipe has to hold.
      stochastic: It adds noise, and its grid ends `last_step_size` before the data.
      grid: Makes its times from their number and the time shift; None for `time_grid`.
    """

    run: Callable[[SamplingProblem], Array]
    options: tuple[str, ...] = SolverOptions._fields
    stochastic: bool = False
    grid: Callable[[int, float], Array] | None = None


def find_sampler(name: str) -> Sampler:
    """Returns a sampler of SAMPLERS, or one from outside the package.

    Args:
      name: Its name, or "package.module:name" of a `Sampler` or of a function from a
        `SamplingProblem` to the sample [B, ...].

    Raises:
      ConfigError: If there is no such sampler.
    """
    if name in SAMPLERS:
        return SAMPLERS[name]
    if not is_reference(name):
        raise ConfigError(
            f"config.sample.method={name!r} is unknown",
            f"choose from {', '.join(SAMPLERS)}, or name your own as package.module:function",
        )
    found = load_object("config.sample.method", name)
    if not callable(found) and not isinstance(found, Sampler):
        raise ConfigError(
            f"config.sample.method={name!r} is a {type(found).__name__}",
            "name a function from a SamplingProblem to the sample, or a Sampler",
        )
    return found if isinstance(found, Sampler) else Sampler(found)


def time_grid(
    num_points: int,
    path: str,
    prediction: str,
    shift: float = 1.0,
    *,
    last_step: float | None = None,
    sample_eps: float | None = None,
    time_range: Sequence[float] = (),
) -> Array:
    """Returns sampling times from noise to data, shifted as in training.

    Args:
      num_points: Points n, so n - 1 solver steps.
      path: Name of the path.
      prediction: Kind of prediction; velocity grids end just before the data.
      shift: Factor on the odds of t.
      last_step: For SDE samplers: unshifted time at which the grid ends, 0 for the data itself.
      sample_eps: Distance from both ends for noise and score predictions.
      time_range: Lowest and highest training time before the shift; () for the prediction's own.

    Returns:
      Decreasing times [n].

    Raises:
      ConfigError: If there are fewer than two points or the shift is below 1.
    """
    if num_points < 2:
        raise ConfigError(f"config.sample.num_points={num_points}", "two points make one step")
    if shift < 1:
        raise ConfigError(f"config.objective.time_shift={shift}", "use 1 or more")
    low, high = choose_range(time_range, time_support(path, prediction, sample_eps))
    if last_step is not None:
        low, high = 0.0, 1 - last_step
    return shift_time(1 - jnp.linspace(low, high, num_points), shift)


def released_grid(num_points: int, shift: float) -> Array:
    """Returns Scale-RAE's sampling times, decreasing; the last one is not 0.

    Every so many of a thousand times, rounded half to even, with their odds multiplied by `shift`.

    Raises:
      ConfigError: If there are fewer than three points.
    """
    if num_points < 3:
        raise ConfigError(
            f"config.sample.num_points={num_points}", "the released sampler needs 3 or more"
        )
    stride = 999 / (num_points - 1)
    times = (np.array([round(i * stride) for i in range(num_points)]) + 1) / 1000
    return jnp.asarray(shift * times / (1 + (shift - 1) * times))[::-1]


def sample_released(velocity: Velocity, noise: Array, grid: Array) -> Array:
    """Integrates as Scale-RAE's released sampler does.

    It takes the noise for the state at the second time, and after the walk down to the last time
    takes one more step, from the second time up to the first: parity with published samples needs
    it. Source: Scale-RAE; spec t2i 3.

    Args:
      velocity: `(x [B, ...], t [B]) -> dx/dt`.
      noise: State [B, ...].
      grid: `released_grid`.
    """
    x = sample_ode(velocity, noise, grid[1:])
    return solvers.fixed_step(velocity, x, grid[1], grid[0], "euler")


def sample_ode(
    velocity: Velocity,
    noise: Array,
    grid: Array,
    method: str = "euler",
    *,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    error_norm: str = "sample",
    return_trajectory: bool = False,
) -> Array:
    """Integrates the probability flow along the grid.

    Args:
      velocity: `(x [B, ...], t [B]) -> dx/dt`.
      noise: State [B, ...] at grid[0].
      grid: Monotone times [n].
      method: One of ODE_METHODS; "heun" is "heun2", "heun-euler" JiT's solver, whose last step is
        Euler's, so that the network never sees t = 0.
      rtol: Relative tolerance of dopri5.
      atol: Absolute tolerance of dopri5.
      error_norm: Step control of dopri5, per "sample" or over the "batch" as in the original;
        only the former makes a sample independent of its batch.
      return_trajectory: Returns the states at all grid points.

    Returns:
      The last state [B, ...], or all [n, B, ...].

    Raises:
      ConfigError: If the method or the norm is unknown.
    """
    method = "heun2" if method == "heun" else method
    if method not in ODE_METHODS:
        raise ConfigError(
            f"config.sample.method={method!r}", f"choose from {', '.join(ODE_METHODS)}"
        )
    if error_norm not in ("sample", "batch"):
        raise ConfigError(f"error norm {error_norm!r}", "use 'sample' or 'batch'")
    if method == "dopri5":
        states = solvers.dopri5(velocity, noise, grid, rtol, atol, error_norm)
        return states if return_trajectory else states[-1]

    def run(x: Array, times: Array, method: str) -> tuple[Array, Any]:
        def step(x: Array, ends: tuple[Array, Array]) -> tuple[Array, Any]:
            x = solvers.fixed_step(velocity, x, *ends, method)
            return x, x if return_trajectory else None

        return jax.lax.scan(step, x, (times[:-1], times[1:]))

    if method != HEUN_THEN_EULER:
        last, states = run(noise, grid, method)
        return jnp.concatenate([noise[None], states]) if return_trajectory else last
    x, states = run(noise, grid[:-1], "heun2")
    last = solvers.fixed_step(velocity, x, grid[-2], grid[-1], "euler")
    return jnp.concatenate([noise[None], states, last[None]]) if return_trajectory else last


def sample_sde(
    predict: Velocity,
    objective: Objective,
    noise: Array,
    grid: Array,
    step_noise: Callable[[Array], Array],
    *,
    method: str = "euler",
    form: str = "sigma",
    norm: float = 1.0,
    last_step: str = "mean",
    last_step_size: float = 0.04,
    return_trajectory: bool = False,
) -> Array:
    """Integrates the reverse SDE along the grid, then takes one noiseless last step.

    Args:
      predict: The network, `(x [B, ...], t [B]) -> out`, with or without guidance.
      objective: Turns predictions into velocities and scores.
      noise: State [B, ...] at grid[0].
      grid: Decreasing times [n], from `time_grid(last_step=...)`.
      step_noise: Standard normals shaped like the state for step index 0..n-2.
      method: "euler" (Euler-Maruyama) or "heun" (stochastic Heun).
      form: Diffusion coefficient, one of DIFFUSION_FORMS.
      norm: Scale of the diffusion coefficient.
      last_step: One of LAST_STEPS.
      last_step_size: Size of the last step. DSR-compat: it is taken at the unshifted time of that
        value, although a shifted grid ends elsewhere.
      return_trajectory: Returns the n solver states, the last one after the last step.

    Returns:
      The sample [B, ...], or [n, B, ...]: n - 1 solver states and the sample.

    Raises:
      ConfigError: For an unknown or unusable setting.
    """
    last_step = last_step.lower()
    _check_sde(method, form, last_step)

    def diffusion(x: Array, t: Array) -> Array:
        return objective.path.diffusion(x, jnp.broadcast_to(t, x.shape[:1]), form, norm)

    def drift(x: Array, t: Array) -> Array:
        t = jnp.broadcast_to(t, x.shape[:1])
        out = predict(x, t)
        return objective.velocity(out, x, t) - diffusion(x, t) * objective.score(out, x, t)

    def step(x: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Any]:
        start, end, index = inputs
        increment = jnp.sqrt(2 * diffusion(x, start) * (start - end)) * step_noise(index)
        x = (_euler_maruyama if method == "euler" else _heun)(drift, x, start, end, increment)
        return x, x if return_trajectory else None

    steps = (grid[:-1], grid[1:], jnp.arange(grid.shape[0] - 1))
    x, states = jax.lax.scan(step, noise, steps)
    final = x
    if last_step != "none":
        final = _last_step(predict, objective, x, drift, last_step, last_step_size)
    return jnp.concatenate([states, final[None]]) if return_trajectory else final


def _solve_ode(problem: SamplingProblem, method: str) -> Array:
    options = problem.options
    return sample_ode(
        problem.velocity,
        problem.noise,
        problem.grid,
        method,
        rtol=options.rtol,
        atol=options.atol,
    )


def _solve_sde(problem: SamplingProblem, method: str) -> Array:
    options = problem.options
    return sample_sde(
        problem.predict,
        problem.objective,
        problem.noise,
        problem.grid,
        problem.step_noise,
        method=method,
        form=options.sde_form,
        norm=options.sde_norm,
        last_step=options.last_step,
        last_step_size=options.last_step_size,
    )


def _euler_maruyama(
    drift: Callable[[Array, Array], Array], x: Array, start: Array, end: Array, increment: Array
) -> Array:
    return x - drift(x, start) * (start - end) + increment


def _heun(
    drift: Callable[[Array, Array], Array], x: Array, start: Array, end: Array, increment: Array
) -> Array:
    dt = start - end
    x = x + increment
    first = drift(x, start)
    return x - 0.5 * dt * (first + drift(x - dt * first, end))


def _last_step(
    predict: Velocity,
    objective: Objective,
    x: Array,
    drift: Callable[[Array, Array], Array],
    kind: str,
    size: float,
) -> Array:
    """Takes the last step, from time `size` to the data, without noise."""
    t = jnp.full(x.shape[:1], size)
    if kind == "mean":
        return x - drift(x, t) * size
    out = predict(x, t)
    if kind == "euler":
        return x - objective.velocity(out, x, t) * size
    at = expand(t, x)
    alpha, sigma = objective.path.alpha(at), objective.path.sigma(at)
    return x / alpha + sigma**2 / alpha * objective.score(out, x, t)


def _check_sde(method: str, form: str, last_step: str) -> None:
    """Raises ConfigError for settings with which the reverse SDE cannot be sampled."""
    if method not in SDE_METHODS:
        raise ConfigError(f"SDE method {method!r}", f"choose from {', '.join(SDE_METHODS)}")
    if last_step not in LAST_STEPS:
        raise ConfigError(f"SDE last step {last_step!r}", f"choose from {', '.join(LAST_STEPS)}")
    if form == "SBDM":
        raise ConfigError(
            "diffusion form 'SBDM' is negative or infinite in this time direction",
            f"choose from {', '.join(f for f in DIFFUSION_FORMS if f != 'SBDM')}",
        )
    if method == "heun" and last_step == "none":
        raise ConfigError(
            "stochastic Heun without a last step evaluates the score at t = 0, where it diverges",
            "use last step 'mean', 'euler' or 'tweedie'",
        )


_ODE_OPTIONS = {"dopri5": ("rtol", "atol")}
_SDE_OPTIONS = ("sde_form", "sde_norm", "last_step", "last_step_size")
SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        method: Sampler(partial(_solve_ode, method=method), _ODE_OPTIONS.get(method, ()))
        for method in ("heun", *ODE_METHODS)
    }
    | {
        "released": Sampler(
            lambda problem: sample_released(problem.velocity, problem.noise, problem.grid),
            (),
            grid=released_grid,
        )
    }
    | {
        f"sde-{method}": Sampler(partial(_solve_sde, method=method), _SDE_OPTIONS, stochastic=True)
        for method in SDE_METHODS
    }
)
"""The samplers of this package by name."""
