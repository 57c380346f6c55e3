"""AdamW, clipping and learning rates with the semantics of the official PyTorch trainer.

Source: DSR utils/optim_utils.py, torch.optim.AdamW; spec denoiser 8. Optax's own parts differ in
small ways that a comparison over steps sees: it clips by c / norm instead of c / (norm + 1e-6), and
takes 1 - b2**k in float32, which for b2 = 0.999 loses four digits in the first steps.
"""

import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.trees import fill, flatten_names, select
from dsr_jax.core.typing import Array, Params, PyTree
from dsr_jax.training.skipping import array_norms

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class LearningRate:
    """Learning rate of the 0-based step k.

    Warm-up for k < warmup_steps, then linear or cosine decay from `base` to `final`, which is
    reached at `decay_end_steps` and kept.

    Attributes:
      base: Highest rate.
      schedule: "constant", "linear" or "cosine".
      final: Last rate; not used by "constant".
      warmup_steps: Steps W before the decay.
      decay_end_steps: Step E at which the decay ends; taken as W if it is smaller.
      warmup_from_zero: During the warm-up the rate is base * (k + warmup_offset) / W, else it is
        `base`.
      warmup_offset: 1 as in DSR, or 0 as in JiT, where the first step has rate 0.
    """

    base: float
    schedule: str = "constant"
    final: float = 0.0
    warmup_steps: int = 0
    decay_end_steps: int = 0
    warmup_from_zero: bool = False
    warmup_offset: int = 1

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ConfigError(
                f"config.optim.schedule={self.schedule!r} is unknown",
                f"choose from {', '.join(SCHEDULES)}",
            )
        _require("lr", self.base, 0 < self.base < math.inf, "it must be positive")
        _require("final_lr", self.final, 0 <= self.final < math.inf, "it must not be negative")
        _require("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "use 0 for none")
        _require("warmup_offset", self.warmup_offset, self.warmup_offset in (0, 1), "use 0 or 1")
        _require(
            "decay_end_steps",
            self.decay_end_steps,
            self.schedule == "constant" or self.decay_end_steps > 0,
            f"the {self.schedule} schedule needs the step at which final_lr is reached, for "
            "example config.train.steps",
        )

    def __call__(self, step: int | Array) -> Any:
        """Returns the rate: a float64 for an int, a float32 scalar for a (traced) array."""
        xp: Any = jnp if isinstance(step, jax.Array) else np
        k = jnp.asarray(step, jnp.float32) if xp is jnp else np.float64(step)
        warm, end = self.warmup_steps, max(self.decay_end_steps, self.warmup_steps)
        factor = xp.ones_like(k)
        if self.schedule != "constant":
            ratio = self.final / self.base
            progress = xp.clip((k - warm) / max(end - warm, 1), 0.0, 1.0)
            if self.schedule == "linear":
                factor = 1 - (1 - ratio) * progress
            else:
                factor = ratio + (1 - ratio) * 0.5 * (1 + xp.cos(np.pi * progress))
            factor = xp.where(k >= end, ratio, factor)
        if warm:
            rising = (k + self.warmup_offset) / warm if self.warmup_from_zero else 1.0
            factor = xp.where(k < warm, rising, factor)
        return self.base * factor


class ParamGroup(NamedTuple):
    """Parameters with a learning rate and moments' decays of their own.

    Attributes:
      patterns: Patterns of names, matched as those of `Optimizer.freeze`.
      lr_factor: Factor on the learning rate.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
    """

    patterns: Sequence[str]
    lr_factor: float
    b1: float
    b2: float


@dataclass(frozen=True)
class Optimizer:
    """AdamW over the parameters that are not frozen, which alone have moments.

    Attributes:
      learning_rate: Rate by step.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      weight_decay: Decoupled: parameters shrink by `lr * weight_decay` of themselves.
      clip_norm: Largest global gradient norm; 0 for no clipping.
      freeze: Patterns of parameters that are not trained, matched against whole names such as
        "t_embedder/W" and against the levels above them ("t_embedder"). The default trains
        everything. DSR-compat: the official trainer declares position tables and Fourier
        frequencies frozen and then trains them all the same (spec denoiser 1.11);
        `freeze=("pos_embed", "register_pos_embed", "t_embedder/W")` is what it declares.
      groups: Groups with values of their own; a parameter belongs to the first that matches.
    """

    learning_rate: LearningRate
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    freeze: Sequence[str] = ()
    groups: Sequence[ParamGroup] = ()

    def __post_init__(self) -> None:
        for group in self.groups:
            fits = isinstance(group.patterns, (tuple, list)) and group.lr_factor >= 0
            if not fits or not all(0 <= b < 1 for b in group[2:]):
                raise ConfigError(
                    f"config.optim.groups holds {tuple(group)}",
                    "write each as ((PATTERN, ...), factor on lr, b1, b2), with b1 and b2 in "
                    "[0, 1)",
                )
        for name in ("b1", "b2"):
            value = getattr(self, name)
            _require(name, value, 0 <= value < 1, "use a value in [0, 1)")
        _require("eps", self.eps, self.eps > 0, "use a value above 0")
        decay, clip = self.weight_decay, self.clip_norm
        _require("weight_decay", decay, 0 <= decay < math.inf, "use 0 for none")
        _require("clip_norm", clip, 0 <= clip < math.inf, "use 0 for none")
        if isinstance(self.freeze, str):
            raise ConfigError(
                f"config.optim.freeze={self.freeze!r} is not a tuple of patterns",
                "write a tuple of patterns",
            )

    def init(self, params: Params) -> PyTree:
        """Returns the moments; `params` may be boxed."""
        return self._direction(params).init(self._trained(params))

    def freeze_params(self, params: Params) -> Params:
        """Stops gradients into frozen parameters, so that no norm counts them.

        Raises:
          ConfigError: If a pattern matches nothing.
        """
        if not self.freeze:
            return params
        return jax.tree.map(
            lambda p, kept: p if kept else jax.lax.stop_gradient(p), params, self.trainable(params)
        )

    def zero_frozen(self, grads: PyTree) -> PyTree:
        """Sets the gradients of frozen parameters to zero, so that no norm counts them.

        Raises:
          ConfigError: If a pattern matches nothing.
        """
        if not self.freeze:
            return grads
        return jax.tree.map(
            lambda g, kept: g if kept else jnp.zeros_like(g), grads, self.trainable(grads)
        )

    def trainable(self, params: Params) -> PyTree:
        """Returns a tree of booleans, False for frozen parameters.

        Raises:
          ConfigError: If a pattern matches nothing.
        """
        names = list(flatten_names(params))
        _check_patterns("freeze", self.freeze, names)
        frozen = [any(_matches(name, pattern) for pattern in self.freeze) for name in names]
        return jax.tree.unflatten(jax.tree.structure(params), [not entry for entry in frozen])

    def apply(
        self, grads: PyTree, opt_state: PyTree, params: Params, step: Array
    ) -> tuple[Params, PyTree]:
        """Takes one step.

        Args:
          grads: Gradients, float32.
          opt_state: Moments from `init` or the step before.
          params: Parameters.
          step: Steps done so far, which decides rate and bias correction.

        Returns:
          New parameters and moments.
        """
        rate = self.learning_rate(step)
        if self.clip_norm:
            grads = _clip_by_global_norm(grads, self.clip_norm)
        trained = self._trained(params)
        update, opt_state = self._direction(params).update(self._trained(grads), opt_state, trained)
        factors = self._trained(self._per_parameter(params, lambda group: group.lr_factor))
        moved = jax.tree.map(lambda p, u, f: p - rate * f * u, trained, update, factors)
        return fill(moved, params), opt_state

    def _trained(self, tree: PyTree) -> PyTree:
        """Returns a tree like the parameters without the frozen ones."""
        return select(tree, self.trainable(tree)) if self.freeze else tree

    def _direction(self, params: Params) -> optax.GradientTransformation:
        decay = self.weight_decay
        # The state's structure is the same whether or not parameters decay.
        shrink = optax.add_decayed_weights(decay) if decay else optax.identity()
        decays = (
            self._trained(self._per_parameter(params, lambda group: group.b1)),
            self._trained(self._per_parameter(params, lambda group: group.b2)),
        )
        return optax.chain(_scale_by_adam(decays, self.eps), shrink)

    def _per_parameter(self, params: Params, value: Callable[[ParamGroup], float]) -> PyTree:
        """Returns a tree of each parameter's value, by its group.

        Raises:
          ConfigError: If a pattern matches nothing.
        """
        names = list(flatten_names(params))
        for group in self.groups:
            _check_patterns("groups", group.patterns, names)
        rest = ParamGroup((), 1.0, self.b1, self.b2)

        def group_of(name: str) -> ParamGroup:
            matching = (
                group
                for group in self.groups
                if any(_matches(name, pattern) for pattern in group.patterns)
            )
            return next(matching, rest)

        return jax.tree.unflatten(
            jax.tree.structure(params), [value(group_of(name)) for name in names]
        )


def _scale_by_adam(decays: tuple[PyTree, PyTree], eps: float) -> optax.GradientTransformation:
    """Returns Adam's direction, with bias corrections exact to float32 rounding.

    Args:
      decays: Decays of first and second moment of each parameter.
      eps: Added to the root of the second moment.
    """

    def init(params: PyTree) -> optax.ScaleByAdamState:
        moments = [jax.tree.map(jnp.zeros_like, params) for _ in range(2)]
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), moments[0], moments[1])

    def correction(decay: float, count: Array) -> Array:
        """Computes 1 - decay**count without its cancellation."""
        return -jnp.expm1(count * math.log(decay)) if decay else jnp.float32(1)

    def update(
        grads: PyTree, state: optax.ScaleByAdamState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        del params
        count = state.count + 1
        first, second = decays
        mu = jax.tree.map(lambda m, g, b1: b1 * m + (1 - b1) * g, state.mu, grads, first)
        nu = jax.tree.map(lambda v, g, b2: b2 * v + (1 - b2) * g * g, state.nu, grads, second)
        factors = {decay: correction(decay, count) for decay in jax.tree.leaves((first, second))}

        def scaled(m: Array, v: Array, b1: float, b2: float) -> Array:
            return m / factors[b1] / (jnp.sqrt(v / factors[b2]) + eps)

        direction = jax.tree.map(scaled, mu, nu, first, second)
        return direction, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _clip_by_global_norm(grads: PyTree, limit: float) -> PyTree:
    """Scales all gradients by min(1, limit / (norm + 1e-6)), as `clip_grad_norm_` does."""
    # From the arrays' norms, which a step reports: else all gradients are read once more.
    scale = jnp.minimum(1.0, limit / (optax.tree.norm(array_norms(grads)) + 1e-6))
    return jax.tree.map(lambda g: g * scale, grads)


def _check_patterns(key: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raises ConfigError if a pattern matches no parameter."""
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            raise ConfigError(
                f"config.optim.{key}: {pattern!r} matches no parameter",
                f"parameters are {', '.join(names[:8])}, ...",
            )


def _matches(name: str, pattern: str) -> bool:
    levels = name.split("/")
    prefixes = ("/".join(levels[:depth]) for depth in range(1, len(levels) + 1))
    return any(fnmatch.fnmatchcase(prefix, pattern) for prefix in prefixes)


def _require(key: str, value: float, condition: bool, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"config.optim.{key}={value}", remedy)
