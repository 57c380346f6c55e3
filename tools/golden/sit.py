"""Golden cases of SiT: network, guidance of some channels, loss and samplers, in SiT's own time.

SiT's t = 0 is noise. The network and what it predicts are compared as they are; loss and samplers
are this package's own, given the network as `flip_time` translates it, so that what they return is
turned back before it is compared.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.diffusion import guidance, samplers
from dsr_jax.diffusion.objectives import make_objective
from dsr_jax.diffusion.paths import flip_time
from tools.golden.compare import Case, Check
from tools.golden.denoiser import architecture, case_network, intermediates, nchw, nhwc

GUIDED_CHANNELS = 3
WHOLE = (0.0, 1.0)
"""SiT trains and samples on all times."""

Network = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def run_sit(case: Case) -> list[Check]:
    """Compares all arrays of the case."""
    model, params = case_network(case)

    @jax.jit
    def network(x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
        return model.apply({"params": params}, x, t, labels)

    return [
        *_forward(case),
        *_guided(case, network),
        *_loss(case, flip_time(network)),
        *_ode(case, flip_time(network)),
        *_sde(case, flip_time(network)),
    ]


def _forward(case: Case) -> list[Check]:
    """Compares the network's output and its intermediates."""
    (model, params), io = case_network(case), case.io
    inputs = nhwc(io["x"]), jnp.asarray(io["t"]), jnp.asarray(io["y"], jnp.int32)
    out, kept = jax.jit(
        lambda *given: model.apply({"params": params}, *given, mutable=["intermediates"])
    )(*inputs)
    kept = kept["intermediates"]
    checks = [Check("out", nchw(out), io["out"], "forward")]
    if "t_freq" in io:
        features = kept["t_embedder"]["features"][0]
        checks.append(Check("t_freq", features, io["t_freq"], "forward"))
    return checks + intermediates(model, kept, params, io)


def _guided(case: Case, network: Network) -> list[Check]:
    """Compares guidance of the first channels; the others keep each half's own prediction."""
    io, null = case.io, case.config["params"]["num_classes"]
    half = len(io["y"]) // 2
    x, t = nhwc(io["x"])[:half], io["t_cfg"][:half]
    labels = io["y"][:half].astype(np.int32)
    guide = guidance.classifier_free(
        network,
        guidance.strength_in(case.config["cfg_scale"]),
        null,
        channels=GUIDED_CHANNELS,
    )
    guided = np.asarray(guide(x, t, labels))
    twice = np.concatenate([labels, np.full_like(labels, null)])
    plain = network(np.concatenate([x, x]), np.concatenate([t, t]), twice)
    second = np.concatenate(
        [guided[..., :GUIDED_CHANNELS], plain[half:, ..., GUIDED_CHANNELS:]], axis=-1
    )
    got = np.concatenate([nchw(guided), nchw(second)])
    return [Check("cfg_out", got, io["cfg_out"], "forward")]


def _loss(case: Case, network: Network) -> list[Check]:
    """Compares the velocity loss on the linear path."""
    io = case.io
    x1, x0 = (jnp.asarray(nhwc(io[name])) for name in ("tr_x1", "tr_x0"))
    t, labels = 1 - jnp.asarray(io["tr_t"]), jnp.asarray(io["tr_y"], jnp.int32)
    objective = make_objective("linear", "velocity")
    xt, ut = objective.path.interpolate(x1, x0, t)
    terms = objective.loss(lambda x, t: network(x, t, labels), x1, x0, t)
    return [
        Check("tr_xt", nchw(xt), io["tr_xt"], "forward"),
        Check("tr_ut", -nchw(ut), io["tr_ut"], "forward"),
        Check("tr_pred", -nchw(terms.prediction), io["tr_pred"], "forward"),
        Check("tr_loss", terms.loss, io["tr_loss"], "loss"),
    ]


def _ode(case: Case, network: Network) -> list[Check]:
    """Compares trajectories named ode_METHOD with their number of points, such as ode_euler5."""
    io, checks = case.io, []
    z, labels = jnp.asarray(nhwc(io["ode_z"])), jnp.asarray(io["tr_y"], jnp.int32)
    for key in io:
        name = key.removeprefix("ode_")
        methods = [method for method in samplers.ODE_METHODS if name.startswith(method)]
        if name == key or not methods:
            continue
        grid = samplers.time_grid(len(io[key]), "linear", "velocity", time_range=WHOLE)
        states = samplers.sample_ode(
            lambda x, t: network(x, t, labels),
            z,
            grid,
            max(methods, key=len),
            error_norm="batch",
            return_trajectory=True,
        )
        checks.append(Check(key, nchw(states), io[key], "trajectory"))
    return checks


def _sde(case: Case, network: Network) -> list[Check]:
    """Compares the reverse SDE with recorded noise."""
    io, settings = case.io, case.config["sde"]
    z, labels = jnp.asarray(nhwc(io["ode_z"])), jnp.asarray(io["tr_y"], jnp.int32)
    noise, last = jnp.asarray(nhwc(io["sde_noise"])), str(settings["last_step"]).lower()
    size = 0.0 if last == "none" else settings["last_step_size"]
    states = samplers.sample_sde(
        lambda x, t: network(x, t, labels),
        make_objective("linear", "velocity"),
        z,
        samplers.time_grid(settings["num_steps"], "linear", "velocity", last_step=size),
        lambda index: noise[index],
        # Without a last step, the solver itself makes the step to the data.
        method=settings["method"].lower(),
        form=settings["form"],
        norm=settings["norm"],
        last_step=last,
        last_step_size=size,
        return_trajectory=True,
    )
    return [Check("sde_traj", nchw(states), io["sde_traj"], "trajectory")]


def _is_sit(config: Mapping[str, Any]) -> bool:
    return architecture(config) == "SiT"


RUNNERS = {"denoiser_sit*": (run_sit, _is_sit)}
