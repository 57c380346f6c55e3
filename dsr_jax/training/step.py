"""One training step: random inputs, loss, gradients, update, EMA, metrics.

Source: DSR train.py; spec denoiser 8.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import optax

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.rng import normal_per_sample, sample_keys, stream_key, uniform_per_sample
from dsr_jax.core.typing import Array, Batch, Metrics, Params, PyTree
from dsr_jax.diffusion.guidance import drop_labels
from dsr_jax.diffusion.objectives import Objective, bin_losses
from dsr_jax.diffusion.token_weights import TokenWeights
from dsr_jax.training.optimizers import Optimizer
from dsr_jax.training.skipping import array_norms
from dsr_jax.training.state import Reshard, TrainState, update_ema

State = TypeVar("State", bound=TrainState)

ApplyFn = Callable[..., Array]
"""`(params, x [B, h, w, C], t [B], labels [B]) -> out [B, h, w, C]`; a network with dropout takes
one key per sample [B] behind them."""


class Encode(Protocol):
    """Function from images to latents, such as `InputSpace.encode`."""

    def __call__(self, variables: PyTree, images: Array, keys: Array, /) -> Array:
        """Maps images [B, H, W, C] in [0, 1] to latents [B, h, w, C], with a key per sample."""
        ...


class EncodeWithNorms(Protocol):
    """Function from images to latents and token norms, such as `RAE.encode_with_norms`."""

    def __call__(self, variables: PyTree, images: Array, keys: Array, /) -> tuple[Array, Array]:
        """Returns latents [B, h, w, C] and norms [B, h, w]."""
        ...


class RandomInputs(NamedTuple):
    """The random inputs of a step for one batch.

    Attributes:
      t: Times [B].
      x0: Noise [B, h, w, C].
      labels: Labels [B], some of them replaced by the null label.
      dropout: Keys [B] for the network's dropout, None where it has none.
      token_weights: Weights [B, h, w, 1] of the tokens' losses, of mean 1; None for equal ones.
    """

    t: Array
    x0: Array
    labels: Array
    dropout: Array | None = None
    token_weights: Array | None = None


def loss_and_grads(
    apply_fn: ApplyFn, objective: Objective, params: Params, x1: Array, inputs: RandomInputs
) -> tuple[Array, PyTree]:
    """Computes losses and the gradient of their mean on given inputs.

    Args:
      apply_fn: The network.
      objective: Path, prediction and weights.
      params: Parameters at which to differentiate.
      x1: Data [B, h, w, C].
      inputs: Times, noise and labels.

    Returns:
      Losses [B], float32, and gradients like `params`.
    """

    def mean_loss(p: Params) -> tuple[Array, Array]:
        more = () if inputs.dropout is None else (inputs.dropout,)
        network = lambda x, t: apply_fn(p, x, t, inputs.labels, *more)  # noqa: E731
        terms = objective.loss(network, x1, inputs.x0, inputs.t)
        loss = terms.loss
        if inputs.token_weights is not None:
            loss = jnp.mean(terms.per_element * inputs.token_weights, axis=(1, 2, 3))
        loss = loss.astype(jnp.float32)
        return jnp.mean(loss), loss

    grads, loss = jax.grad(mean_loss, has_aux=True)(params)
    return loss, grads


def apply_gradients(
    state: State, grads: PyTree, optimizer: Optimizer, reshard: Reshard = lambda tree: tree
) -> State:
    """Returns the state after one update: parameters, moments, then EMA, then the count.

    Args:
      state: The state before.
      grads: Gradients like `state.params`, laid out by `reshard`.
      optimizer: The update.
      reshard: Result of `make_reshard`, which shards the update.
    """
    params, opt_state = optimizer.apply(grads, state.opt_state, reshard(state.params), state.step)
    params = reshard(params)
    ema = update_ema(state.ema, params)
    return dataclasses.replace(
        state, step=state.step + 1, params=params, ema=ema, opt_state=opt_state
    )


@dataclass(frozen=True, eq=False)
class TrainStep:
    """The step that the caller compiles, with shardings and donation of the state.

    Whatever is random is a function of (seed, step, the sample's index in the run), so that mesh,
    hosts and accumulation do not change it. The global batch has one row per sample: "image",
    uint8 or float in [0, 1], "label" and "index".

    Attributes:
      apply_fn: The network.
      encode: Images to latents, not differentiated; within the step so that it, too, works on one
        micro-batch at a time.
      objective: Path, prediction and weights.
      time_sampler: Uniform numbers [B] to times [B].
      optimizer: Parameters' update.
      seed: The run's seed.
      null_label: Label of "no class".
      label_dropout: Fraction of labels replaced by it.
      times: Times, each with its noise and dropped label, that are trained per sample and step.
      dropout: Gives the network keys for dropout.
      token_weights: Weighs the tokens' losses by their norms, which `encode` then returns, too. The
        weights' mean is 1 over a micro-batch.
      accumulate: Micro-batches per step; gradients and losses are those of the whole batch.
      num_time_bins: Equal intervals of t for which losses are reported.
      reshard: Result of `make_reshard`; None does not shard the update.

    Raises:
      ConfigError: For a fraction outside [0, 1] or counts below 1.
    """

    apply_fn: ApplyFn
    encode: Encode | EncodeWithNorms
    objective: Objective
    time_sampler: Callable[[Array], Array]
    optimizer: Optimizer
    _: KW_ONLY
    seed: int
    null_label: int
    label_dropout: float = 0.1
    times: int = 1
    dropout: bool = False
    token_weights: TokenWeights | None = None
    accumulate: int = 1
    num_time_bins: int = 8
    reshard: Reshard | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.label_dropout <= 1:
            raise ConfigError(
                f"config.objective.label_dropout={self.label_dropout} is not a fraction",
                "use 0 to 1",
            )
        if self.times < 1:
            raise ConfigError(f"config.objective.times={self.times}", "use 1 or more")
        if self.accumulate < 1 or self.num_time_bins < 1:
            raise ConfigError(
                f"config.optim.accumulate={self.accumulate}, "
                f"config.objective.time_bins={self.num_time_bins}",
                "both must be at least 1",
            )

    def __call__(
        self, state: TrainState, batch: Batch, variables: PyTree = None
    ) -> tuple[TrainState, Metrics]:
        """Does one step.

        Args:
          state: The state before.
          batch: The global batch.
          variables: The encoder's frozen arrays: arguments, since captured arrays become constants
            of the program.

        Returns:
          The state after it, and metrics: "loss", "grad_norm" before clipping, "param_norm" after
          the update, "array_norms" of the gradients by name, "learning_rate", "dropped_labels"
          (fraction), "bin_loss" and "bin_count" [num_time_bins] (sum and count), and "finite",
          False where any of these or of the parameters is no number: such a state must not be kept.
        """
        grads, sums = self._gradients(state, batch, variables)
        new_state = apply_gradients(state, grads, self.optimizer, self._divide)
        of_arrays = array_norms(grads)
        metrics = {
            **self._means(sums, batch["index"].shape[0]),
            # From the arrays' norms: else all gradients are read once more.
            "grad_norm": optax.tree.norm(of_arrays),
            "array_norms": of_arrays,
            "param_norm": optax.tree.norm(new_state.params),
            "learning_rate": self.optimizer.learning_rate(state.step),
        }
        norms = jnp.stack([metrics["loss"], metrics["grad_norm"], metrics["param_norm"]])
        return new_state, {**metrics, "finite": jnp.all(jnp.isfinite(norms))}

    def _means(self, sums: dict[str, Array], size: int) -> Metrics:
        """Returns the metrics of a batch of `size` samples from sums over it."""
        means = {name: sums[name] / size for name in ("loss", "dropped_labels")}
        return {**sums, **means}

    def _divide(self, tree: PyTree) -> PyTree:
        """Lays a tree like the parameters out for the update."""
        return self.reshard(tree) if self.reshard else tree

    def _random_inputs(
        self, step: Array, batch: Batch, variables: PyTree
    ) -> tuple[Array, RandomInputs]:
        """Returns latents and the random inputs that go with them, `times` rows per sample."""

        def keys(stream: str) -> Array:
            first = sample_keys(stream_key(self.seed, stream, step), batch["index"])
            more = [jax.vmap(jax.random.fold_in, (0, None))(first, k) for k in range(1, self.times)]
            # A sample's rows are neighbors, so that they stay on its device.
            return jnp.stack([first, *more], axis=1).reshape(-1) if more else first

        def repeat(rows: Array) -> Array:
            return jnp.repeat(rows, self.times, axis=0) if self.times > 1 else rows

        weigh = self.token_weights
        images = to_unit_range(batch["image"])
        encoded: Any = self.encode(variables, images, keys("encode")[:: self.times])
        x1, norms = encoded if weigh else (encoded, jnp.zeros(()))
        x1 = repeat(jax.lax.stop_gradient(x1.astype(jnp.float32)))
        labels = self._drop(batch, repeat, uniform_per_sample(keys("label_dropout")))
        t = self.time_sampler(uniform_per_sample(keys("time")))
        noise = normal_per_sample(keys("noise"), x1.shape[1:])
        weights = weigh(repeat(norms)[..., None], t) if weigh else None
        return x1, RandomInputs(
            t, noise, labels, keys("dropout") if self.dropout else None, weights
        )

    def _drop(self, batch: Batch, repeat: Callable[[Array], Array], u: Array) -> Array:
        """Returns the labels of all rows, some of them dropped, from uniform numbers."""
        return drop_labels(repeat(batch["label"]), u, self.label_dropout, self.null_label)

    def _micro_step(
        self, state: TrainState, batch: Batch, variables: PyTree
    ) -> tuple[PyTree, dict[str, Array]]:
        """Returns gradients of the mean loss of one micro-batch, and sums over it."""
        x1, inputs = self._random_inputs(state.step, batch, variables)
        freeze = self.optimizer.freeze_params
        trained = lambda p, *args: self.apply_fn(freeze(p), *args)  # noqa: E731
        loss, grads = loss_and_grads(trained, self.objective, state.params, x1, inputs)
        bin_loss, bin_count = bin_losses(loss, inputs.t, self.num_time_bins)
        dropped = jnp.sum(inputs.labels == self.null_label, dtype=jnp.float32)
        sums = {
            "loss": jnp.sum(loss) / self.times,
            "dropped_labels": dropped / self.times,
            "bin_loss": bin_loss,
            "bin_count": bin_count,
        }
        return self._divide(grads), sums

    def _gradients(
        self, state: TrainState, batch: Batch, variables: PyTree
    ) -> tuple[PyTree, dict[str, Array]]:
        """Returns gradients of the mean loss of the whole batch, and sums over it."""
        if self.accumulate == 1:
            return self._micro_step(state, batch, variables)

        def add(total: PyTree, micro: Batch) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, self._micro_step(state, micro, variables)), None

        micro_batches = split_batch(batch, self.accumulate)
        first = jax.tree.map(lambda rows: rows[0], micro_batches)
        shapes = jax.eval_shape(self._micro_step, state, first, variables)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (grads, sums), _ = jax.lax.scan(add, zeros, micro_batches)
        return jax.tree.map(lambda g: g / self.accumulate, grads), sums


def split_batch(batch: Batch, parts: int) -> Batch:
    """Deals the rows [B, ...] out to micro-batches [parts, B / parts, ...]: row b to b % parts.

    Each device holds a contiguous range of rows. Dealt out this way, its rows spread evenly over
    the micro-batches, which therefore lie on all devices without any communication; cut into
    contiguous pieces, each micro-batch would lie on a few devices only.

    Raises:
      ConfigError: If the batch is no multiple of `parts`.
    """

    def split(rows: Array) -> Array:
        if rows.shape[0] % parts:
            raise ConfigError(
                f"config.data.global_batch={rows.shape[0]} is no multiple of "
                f"config.optim.accumulate={parts}",
                "change either",
            )
        return rows.reshape(rows.shape[0] // parts, parts, *rows.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, dict(batch))


def to_unit_range(images: Array) -> Array:
    """Maps uint8 images to [0, 1]; floats are there already."""
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 255
    return images
