"""Golden cases of the trainer: consecutive optimizer steps and learning-rate tables."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.diffusion.guidance import drop_labels
from dsr_jax.diffusion.objectives import make_objective
from dsr_jax.diffusion.time_sampling import make_time_sampler
from dsr_jax.training.optimizers import LearningRate, Optimizer
from dsr_jax.training.state import TrainState, create_state
from dsr_jax.training.step import RandomInputs, apply_gradients, loss_and_grads
from tools.golden.compare import Case, Check
from tools.golden.denoiser import case_network, is_denoiser, nhwc, official

_SCHEDULE = re.compile(
    r"Scheduler: (?P<kind>\w+) with warmup_steps=(?P<warmup>\d+), decay_end_steps=(?P<end>\d+), "
    r"final_lr=(?P<final>[\d.e+-]+), base_lr=(?P<base>[\d.e+-]+), warmup_from_zero=(?P<zero>\w+)"
)
_ADAMW = re.compile(
    r"AdamW with lr=[\d.e+-]+, betas=\((?P<b1>[\d.e+-]+), (?P<b2>[\d.e+-]+)\), "
    r"weight_decay=(?P<decay>[\d.e+-]+), eps=(?P<eps>[\d.e+-]+)"
)


def parse_schedule(message: str) -> LearningRate:
    """Returns the schedule described by the official trainer's log line.

    Raises:
      ValueError: If it is no such line.
    """
    found = _SCHEDULE.search(message)
    if found is None:
        raise ValueError(f"no schedule in {message!r}")
    return LearningRate(
        base=float(found["base"]),
        schedule=found["kind"],
        final=float(found["final"]),
        warmup_steps=int(found["warmup"]),
        decay_end_steps=int(found["end"]),
        warmup_from_zero=found["zero"] == "True",
    )


def parse_optimizer(config: Mapping[str, Any]) -> Optimizer:
    """Returns the optimizer of a training case.

    Raises:
      ValueError: If its log line is of another form.
    """
    found = _ADAMW.search(config["optimizer"])
    if found is None:
        raise ValueError(f"no AdamW in {config['optimizer']!r}")
    return Optimizer(
        parse_schedule(config["scheduler"]),
        b1=float(found["b1"]),
        b2=float(found["b2"]),
        eps=float(found["eps"]),
        weight_decay=float(found["decay"]),
        clip_norm=config["recipe_values"]["clip"] or 0.0,
    )


def run_training(case: Case) -> list[Check]:
    """Losses, gradients, rates, parameters and EMA weights of consecutive steps."""
    config, io = case.config, case.io
    model, params = case_network(case)
    optimizer = parse_optimizer(config)
    state = create_state(params, optimizer, (config["recipe_values"]["ema"],))
    objective = make_objective("linear", config["prediction"])
    sampler = make_time_sampler(
        config["time_dist_type"], "linear", config["prediction"], config["time_dist_shift"]
    )
    params_kind = "stress_params" if config["recipe"] == "stress" else "train_params"

    def network(params: Any, x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
        return model.apply({"params": params}, x, t, labels)

    @jax.jit
    def step(state: TrainState, x1: jax.Array, inputs: RandomInputs) -> tuple[TrainState, Any, Any]:
        losses, grads = loss_and_grads(network, objective, state.params, x1, inputs)
        return apply_gradients(state, grads, optimizer), losses, grads

    checks, kept = [], _every_tensor(case, lambda tree: official(model, tree))
    for k in range(config["nsteps"]):
        labels = drop_labels(
            jnp.asarray(io["labels"][k], jnp.int32),
            jnp.asarray(io["u_drop"][k]),
            config["label_dropout"],
            config["params"]["num_classes"],
        )
        t = sampler(jnp.asarray(io["u_time"][k]))
        inputs = RandomInputs(t, jnp.asarray(nhwc(io["x0"][k])), labels)
        rate = optimizer.learning_rate(state.step)
        state, losses, grads = step(state, jnp.asarray(nhwc(io["x1"][k])), inputs)
        norm = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in _leaves(grads)))
        checks += [
            Check(f"t[{k}]", t, io["t"][k], "forward"),
            Check(f"labels[{k}]", labels, io["labels_effective"][k], "exact"),
            Check(f"lr[{k}]", rate, io["lr"][k], "forward"),
            Check(f"loss[{k}]", np.mean(losses), io["loss"][k], "train_loss"),
            Check(f"loss_per_sample[{k}]", losses, io["loss_per_sample"][k], "train_loss"),
            Check(f"grad_norm[{k}]", norm, io["grad_norm_before_clip"][k], "gradient"),
        ]
        checks += kept(f"grads_step{k + 1}", grads, "gradient")
        checks += kept(f"params_step{k + 1}", state.params, params_kind)
        (average,) = state.ema.values()
        checks += kept(f"ema_step{k + 1}", average, params_kind)
    return checks


def _leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def _every_tensor(
    case: Case, export: Callable[[Any], dict[str, np.ndarray]]
) -> Callable[[str, Any, str], list[Check]]:
    """Compares trees with the case's files of the same name, where it has one."""

    def checks(name: str, tree: Any, kind: str) -> list[Check]:
        if not (case.path / f"{name}.safetensors").is_file():
            return []
        ours = export(tree)
        return [
            Check(f"{name}:{key}", ours[key], want, kind)
            for key, want in case.weights(name).items()
            if "feat_rope" not in key
        ]

    return checks


def run_schedules(case: Case) -> list[Check]:
    """Compares learning rates at some steps of whole recipes."""
    checks = []
    for name, table in case.config["tables"].items():
        rate = parse_schedule(table["message"])
        steps, want = zip(*table["lr"], strict=True)
        got = np.array([rate(int(step)) for step in steps])
        # The originals are Python floats; ours are float64, computed in another order.
        checks.append(Check(name, got, np.array(want), "exact", tolerance=1e-12))
        traced = jax.vmap(rate)(jnp.asarray(steps))
        checks.append(Check(f"{name} in float32", traced, np.array(want), "forward"))
    return checks


RUNNERS = {
    "denoiser_train_*": (run_training, is_denoiser),
    "denoiser_lr_schedule*": (run_schedules, lambda config: "tables" in config),
}
