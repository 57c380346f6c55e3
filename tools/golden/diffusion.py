"""Golden cases of paths, objectives, time sampling, token weights and samplers."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.diffusion import guidance, samplers
from dsr_jax.diffusion.objectives import make_objective
from dsr_jax.diffusion.paths import get_path
from dsr_jax.diffusion.time_sampling import make_time_sampler
from dsr_jax.diffusion.token_weights import TokenWeights
from tools.golden.compare import Case, Check, checks_of
from tools.golden.denoiser import case_network, is_denoiser, nchw, nhwc, strength_off

Network = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _network(case: Case) -> Network:
    model, params = case_network(case)
    variables = {"params": params}
    return jax.jit(lambda x, t, labels: model.apply(variables, x, t, labels))


def run_loss(case: Case) -> list[Check]:
    """Compares losses, drifts and scores of a network on the linear path."""
    io, network = case.io, _network(case)
    labels = jnp.asarray(io["y"], jnp.int32)
    x1, x0, t = jnp.asarray(nhwc(io["x1"])), jnp.asarray(nhwc(io["x0"])), jnp.asarray(io["t"])
    xt, ut = get_path(case.config["path"]).interpolate(x1, x0, t)
    checks = [
        Check("xt", nchw(xt), io["xt"], "forward"),
        Check("ut", nchw(ut), io["ut"], "forward"),
    ]
    for prediction in ("data", "velocity"):
        objective = make_objective(
            case.config["path"], prediction, t_eps=case.config.get("t_eps", 0.05)
        )
        terms = objective.loss(lambda x, t: network(x, t, labels), x1, x0, t)
        arrays = {
            "pred": nchw(terms.prediction),
            "loss": terms.loss,
            "final_loss": nchw(terms.per_element),
            "drift": nchw(objective.velocity(terms.prediction, xt, t)),
            "score": nchw(objective.score(terms.prediction, xt, t)),
        }
        for name, array in arrays.items():
            kind = "loss" if "loss" in name else "forward"
            checks.append(Check(f"{prediction}_{name}", array, io[f"{prediction}_{name}"], kind))
    return checks


def run_paths(case: Case) -> list[Check]:
    """Compares all paths, predictions and weights with an analytic model."""
    io, norm = case.io, case.config["diffusion_norm"]
    x1, x0, t = (jnp.asarray(io[key]) for key in ("x1", "x0", "t"))

    def model(x: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.tanh(0.6 * x + 0.3 * t.reshape(-1, 1, 1, 1)) + 0.1 * x

    checks = []
    for name in dict.fromkeys(combo.split("/")[0] for combo in case.config["combos"]):
        path = get_path(name)
        xt, ut = path.interpolate(x1, x0, t)
        found = {f"{name}/xt": xt, f"{name}/ut": ut}
        for form in ("sigma", "linear", "decreasing", "inccreasing-decreasing", "SBDM"):
            found[f"{name}/diffusion/{form}"] = path.diffusion(xt, t, form, norm)
        checks += checks_of(found, io, "forward", optional=("*/diffusion/*",))
    for combo in case.config["combos"]:
        name, prediction, weight = combo.split("/")
        objective = make_objective(name, prediction, "" if weight == "None" else weight)
        terms = objective.loss(model, x1, x0, t)
        checks.append(Check(f"{combo}/loss", terms.loss, io[f"{combo}/loss"], "loss"))
        xt, _ = get_path(name).interpolate(x1, x0, t)
        for kind in ("drift", "score"):
            key = f"{name}/{prediction}/{kind}"
            if key in io and weight == "None":
                convert = objective.velocity if kind == "drift" else objective.score
                checks.append(Check(key, convert(model(xt, t), xt, t), io[key], "forward"))
    return checks


def run_time_sampling(case: Case) -> list[Check]:
    """Compares training times made from recorded uniform samples."""
    checks = []
    for row in case.config["table"]:
        prediction, distribution, _ = row["key"].split("/")
        sampler = make_time_sampler(distribution, "linear", prediction, row["shift"])
        got = sampler(jnp.asarray(case.io["u"]))
        checks.append(Check(row["key"], got, case.io[row["key"]], "forward"))
    return checks


def run_weighting(case: Case) -> list[Check]:
    """Compares token weights and the weighted loss."""
    config, io = case.config, case.io
    norm, errors = nhwc(io["token_norm"]), nhwc(io["final_loss"])
    checks = []
    for name, flags in config["cases"].items():
        weights = TokenWeights(
            outlier_norm=flags.get("outlier_token_norm", 0.0),
            norm_shift=flags.get("token_norm_shift", False),
            logit_normal=flags.get("logit_normal_scheduler", False),
            time_shift=config["time_dist_shift"],
        )(jnp.asarray(norm), jnp.asarray(io["t"]))
        loss = np.mean(errors * np.asarray(weights))[None]
        want = io[f"{name}/w_normalised"]
        checks.append(Check(f"{name}/w", nchw(weights), want, "forward"))
        checks.append(Check(f"{name}/loss", loss, io[f"{name}/loss"], "loss"))
    return checks


def _grid_of(run: str, num_points: int, **settings: float) -> tuple[str, jax.Array]:
    """Returns prediction and time grid of a run named like "data/shift6.9282/euler5"."""
    prediction, shift, *_ = run.split("/")
    # Names carry four decimals of the shift; the released one is sqrt(48).
    value = float(shift.removeprefix("shift"))
    value = float(np.sqrt(48)) if abs(value - np.sqrt(48)) < 1e-4 else value
    return prediction, samplers.time_grid(num_points, "linear", prediction, value, **settings)


def run_ode(case: Case) -> list[Check]:
    """Compares trajectories of every solver, with guidance and with clamping."""
    config, io, network = case.config, case.io, _network(case)
    z, labels = jnp.asarray(nhwc(io["z"])), jnp.asarray(io["y"], jnp.int32)
    tolerances = {"rtol": config["rtol"], "atol": config["atol"], "error_norm": "batch"}

    def trajectory(fn: Network, prediction: str, grid: jax.Array, method: str) -> np.ndarray:
        objective = make_objective("linear", prediction)
        return nchw(
            jax.jit(
                lambda z: samplers.sample_ode(
                    lambda x, t: objective.velocity(fn(x, t, labels), x, t),
                    z,
                    grid,
                    method,
                    return_trajectory=True,
                    **tolerances,
                )
            )(z)
        )

    checks = []
    for run in config["runs"]:
        points = int(run[-1])
        prediction, grid = _grid_of(run, points)
        method = run.split("/")[-1][:-1]
        got = trajectory(network, prediction, grid, method)
        checks.append(Check(run, got, io[run], "trajectory"))
        key = f"{run.rsplit('/', 1)[0]}/tgrid{points}"
        if key in io:
            checks.append(Check(key, grid, io[key], "forward"))
    grid = _extra_grid(io, config["runs"])
    if "data/cfg_euler5" in io:
        off = [tuple(config["cfg"]["off_interval"])]
        null = config["params"]["num_classes"]
        strength = strength_off(config["cfg"]["scale"], off)
        guided = guidance.classifier_free(network, strength, null)
        got = trajectory(guided, "data", grid, "euler")
        want = io["data/cfg_euler5"]
        checks.append(Check("data/cfg_euler5", np.concatenate([got, got], 1), want, "trajectory"))
    if "data/clamp_euler5" in io:
        bound = config["clamp_pred"]

        def clamped(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.clip(network(x, t, y), -bound, bound)

        got = trajectory(clamped, "data", grid, "euler")
        checks.append(Check("data/clamp_euler5", got, io["data/clamp_euler5"], "trajectory"))
    return checks


def _extra_grid(io: Mapping[str, np.ndarray], runs: list[str]) -> jax.Array:
    """Returns the shifted five-point grid of the data runs, for guided and clamped runs."""
    shifted = [run for run in runs if run.startswith("data/shift6") and run.endswith("euler5")]
    return _grid_of(shifted[0], 5)[1] if shifted else jnp.asarray(io["data/shift1.0000/tgrid5"])


def run_sde(case: Case) -> list[Check]:
    """Compares trajectories of the reverse SDE with recorded noise."""
    config, io, network = case.config, case.io, _network(case)
    z, labels = jnp.asarray(nhwc(io["z"])), jnp.asarray(io["y"], jnp.int32)
    noise = jnp.asarray(nhwc(io["noise"]))
    size = config["last_step_size"]
    checks = []
    for run in config["runs"]:
        *_, method, form, last = run.split("/")
        end = 0.0 if last == "None" else size
        prediction, grid = _grid_of(run, config["num_steps"], last_step=end)
        # Without a last step, the solver itself makes the step to the data.
        states = samplers.sample_sde(
            lambda x, t: network(x, t, labels),
            make_objective("linear", prediction),
            z,
            grid,
            lambda index: noise[index],
            method=method,
            form=form,
            norm=config["diffusion_norm"],
            last_step=last,
            last_step_size=size,
            return_trajectory=True,
        )
        checks.append(Check(run, nchw(states), io[run], "trajectory"))
    return checks


def _has(*keys: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda config: all(key in config for key in keys)


RUNNERS = {
    "denoiser_transport_loss*": (run_loss, is_denoiser),
    "denoiser_transport_paths*": (run_paths, _has("combos", "diffusion_norm")),
    "denoiser_time_sampling*": (run_time_sampling, _has("table")),
    "denoiser_loss_weighting*": (run_weighting, _has("cases", "time_dist_shift")),
    "denoiser_sampler_ode*": (run_ode, is_denoiser),
    "denoiser_sampler_sde*": (run_sde, is_denoiser),
}
