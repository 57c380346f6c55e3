"""Golden cases of JiT: network, loss, its gradient and samples, in JiT's own time.

JiT's t = 0 is noise. The network is compared as it is; loss and samplers are this package's own,
given the network as `flip_time` translates it.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsr_jax.convert.converter import require_converter
from dsr_jax.convert.jit import CONVERTER
from dsr_jax.convert.rules import torch_to_flax
from dsr_jax.core.typing import Array, Params
from dsr_jax.diffusion import guidance, samplers
from dsr_jax.diffusion.objectives import Objective, make_objective
from dsr_jax.diffusion.paths import flip_time
from dsr_jax.models.jit import JiT
from dsr_jax.training.optimizers import LearningRate, Optimizer
from dsr_jax.training.step import RandomInputs, loss_and_grads
from tools.golden.compare import Case, Check
from tools.golden.denoiser import nchw, nhwc

_SOLVERS = {"euler": "euler", "heun": samplers.HEUN_THEN_EULER}


def run_jit(case: Case) -> list[Check]:
    """Compares all arrays of the case."""
    model = build_jit(case.config["model_config"])
    state = CONVERTER.strip_prefix(case.weights())
    params = torch_to_flax(state, require_converter(type(model)).rules(model))
    checks = []
    if "fwd_out" in case.io:
        checks += _forward(case, model, params)
    if "loss" in case.io:
        checks += _loss(case, model, params)
    return checks + _samples(case, model, params)


def build_jit(sizes: Mapping[str, Any]) -> JiT:
    """Builds the model from the original's constructor arguments."""
    return JiT(
        input_size=sizes["input_size"],
        in_channels=sizes.get("in_channels", 3),
        hidden_size=sizes["hidden_size"],
        depth=sizes["depth"],
        num_heads=sizes["num_heads"],
        num_classes=sizes["num_classes"],
        patch_size=sizes["patch_size"],
        mlp_ratio=sizes.get("mlp_ratio", 4.0),
        bottleneck_dim=sizes.get("bottleneck_dim", 128),
        num_class_tokens=sizes.get("in_context_len", 32),
        class_token_start=sizes.get("in_context_start", 8),
    )


def _forward(case: Case, model: JiT, params: Params) -> list[Check]:
    inputs = (nhwc(case.io["fwd_x"]), jnp.asarray(case.io["fwd_t"]), _labels(case, "fwd_y"))
    out = jax.jit(lambda *given: model.apply({"params": params}, *given))(*inputs)
    return [Check("fwd_out", nchw(out), case.io["fwd_out"], "forward")]


def _loss(case: Case, model: JiT, params: Params) -> list[Check]:
    """The mean loss and the norm of its gradient, from recorded inputs."""
    config, io = case.config, case.io
    # The original's position table is not trained.
    optimizer = Optimizer(LearningRate(1.0), freeze=("pos_embed",))

    def network(p: Params, x: Array, t: Array, labels: Array) -> Array:
        return flip_time(_bound(model, optimizer.freeze_params(p)), "data")(x, t, labels)

    t = 1 - jax.nn.sigmoid(config["P_mean"] + config["P_std"] * jnp.asarray(io["loss_z"]))
    inputs = RandomInputs(t, jnp.asarray(nhwc(io["loss_e"])), _labels(case, "loss_y"))
    losses, grads = jax.jit(
        lambda p: loss_and_grads(network, _objective(case), p, nhwc(io["loss_x1"]), inputs)
    )(params)
    checks = [Check("loss", np.reshape(losses.mean(), io["loss"].shape), io["loss"], "loss")]
    if "grad_norm" in io:
        norm = np.reshape(optax.tree.norm(grads), io["grad_norm"].shape)
        checks.append(Check("grad_norm", norm, io["grad_norm"], "gradient"))
    return checks


def _samples(case: Case, model: JiT, params: Params) -> list[Check]:
    """Compares guided samples of every solver that the case names, from recorded noise."""
    config, io = case.config, case.io
    objective, (low, high) = _objective(case), config.get("cfg_interval", (0.0, 1.0))
    guided = guidance.classifier_free(
        flip_time(_bound(model, params), "data"),
        guidance.strength_in(config.get("cfg", 1.0), (1 - high, 1 - low), open_ends=True),
        model.num_classes,
    )
    labels = _labels(case, "sample_y") if "sample_y" in io else None
    grid = samplers.time_grid(config.get("sampling_steps", 50) + 1, "linear", "data")
    checks = []
    for name, method in _SOLVERS.items():
        if f"sample_{name}" not in io:
            continue

        @jax.jit
        def sample(noise: Array, method: str = method) -> Array:
            return samplers.sample_ode(
                lambda x, t: objective.velocity(guided(x, t, labels), x, t), noise, grid, method
            )

        got = sample(_start(io["sample_noise"], objective.path.noise_scale))
        checks.append(Check(f"sample_{name}", nchw(got), io[f"sample_{name}"], "trajectory"))
    return checks


def _start(noise: np.ndarray, scale: float) -> np.ndarray:
    """Returns noise of the path's scale; cases record either that or standard normals."""
    std = noise.std()
    return nhwc(noise) * (scale if abs(std - 1) < abs(std - scale) else 1)


def _objective(case: Case) -> Objective:
    config = case.config
    return make_objective(
        "linear",
        "data",
        t_eps=config.get("t_eps", 0.05),
        noise_scale=config.get("noise_scale", 1.0),
        clip_target=True,
    )


def _bound(model: JiT, params: Params) -> Any:
    return lambda x, t, labels: model.apply({"params": params}, x, t, labels)


def _labels(case: Case, name: str) -> Array:
    return jnp.asarray(case.io[name], jnp.int32)


def _is_jit(config: Mapping[str, Any]) -> bool:
    return config.get("model") == "JiT" and "model_config" in config


RUNNERS = {"denoiser_jit*": (run_jit, _is_jit)}
