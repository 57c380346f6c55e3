"""The training step of text-to-image models: diffusion loss and next-token loss together.

Source: Scale-RAE cambrian_qwen2.py and its trainer; spec t2i 3.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.slots import is_answer
from dsr_jax.core.typing import Array, Batch, Metrics, Params, PyTree
from dsr_jax.diffusion.objectives import Objective, bin_losses
from dsr_jax.training.language_loss import LanguageLoss, language_loss, supervised
from dsr_jax.training.state import TrainState
from dsr_jax.training.step import RandomInputs, TrainStep

_EPS = 1e-8
"""Added to the number of answer images, as in the original."""


class States(Protocol):
    """Result of `TextModel.read`: hidden states, rows for the denoiser, and which samples count."""

    hidden: Array
    rows: Array
    answers: Array


class TextModel(NamedTuple):
    """The functions of a text-to-image model.

    Attributes:
      read: `(params, tokens [B, L], targets [B, L], latents [B, h, w, C]) -> States`; without
        targets, every image is asked for.
      logits: `(params, hidden [..., H]) -> logits [..., V]`.
      denoise: `(params, x [B, h, w, C], t [B], rows [B, N, Z], dropped [B]) -> out`.
    """

    read: Callable[[Params, Array, Array | None, Array | None], Any]
    logits: Callable[[Params, Array], Array]
    denoise: Callable[[Params, Array, Array, Array, Array], Array]


class JointLosses(NamedTuple):
    """Losses of one batch.

    Attributes:
      language: Sums of next-token losses per sample.
      diffusion: Diffusion losses [B * K] of K times per sample.
      answers: Samples [B] whose image is generated, float32; the others' diffusion loss is void.
    """

    language: LanguageLoss
    diffusion: Array
    answers: Array


def joint_losses(
    model: TextModel,
    objective: Objective,
    params: Params,
    batch: Batch,
    x1: Array,
    inputs: RandomInputs,
    max_targets: int = 0,
    with_language: bool = True,
) -> JointLosses:
    """Computes both losses from one pass of the language model.

    Args:
      model: The model.
      objective: Path, prediction and weights.
      params: Parameters.
      batch: "tokens" and "targets" [B, L].
      x1: Latents [B * K, h, w, C], with the K rows of a sample next to each other.
      inputs: Times [B * K] and noise; as labels which conditions are dropped, bool [B * K].
      max_targets: See `language_loss`.
      with_language: False leaves out the next-token loss: its sums are 0.
    """
    tokens, targets = batch["tokens"], batch["targets"]
    times = x1.shape[0] // tokens.shape[0]
    states: States = model.read(params, tokens, targets, x1[::times])
    rows = jnp.repeat(states.rows, times, axis=0) if times > 1 else states.rows
    network = lambda x, t: model.denoise(params, x, t, rows, inputs.labels)  # noqa: E731
    diffusion = objective.loss(network, x1, inputs.x0, inputs.t).loss.astype(jnp.float32)
    if with_language:
        predict = lambda hidden: model.logits(params, hidden)  # noqa: E731
        language = language_loss(predict, states.hidden, targets, max_targets)
    else:
        language = LanguageLoss(*(jnp.zeros(tokens.shape[0]) for _ in range(2)))
    return JointLosses(language, diffusion, states.answers.astype(jnp.float32))


def total_loss(losses: JointLosses, language_weight: float, diffusion_weight: float) -> Array:
    """Returns the loss of a whole batch: mean over supervised tokens plus mean over images."""
    language = jnp.sum(losses.language.total) / jnp.maximum(jnp.sum(losses.language.tokens), 1)
    answers = jnp.sum(losses.answers)
    diffusion = _per_image(losses) @ losses.answers / (answers + _EPS)
    return language_weight * language + diffusion_weight * diffusion


def _per_image(losses: JointLosses) -> Array:
    return jnp.mean(losses.diffusion.reshape(losses.answers.shape[0], -1), axis=1)


@dataclass(frozen=True, eq=False)
class TextStep(TrainStep):
    """Training step with "tokens" and "targets" [B, L] in place of labels.

    Both means run over the whole batch, whatever the number of micro-batches.

    Attributes:
      model: The model's functions; `apply_fn` is not used.
      language_weight: Weight of the next-token loss; 0 leaves it out.
      diffusion_weight: Weight of the diffusion loss.
      max_targets: Positions of a sample at which logits are computed, 0 for all.

    Raises:
      ConfigError: If no loss has a weight.
    """

    _: KW_ONLY
    model: TextModel
    language_weight: float = 1.0
    diffusion_weight: float = 2.0
    max_targets: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = self.language_weight, self.diffusion_weight
        if min(weights) < 0 or max(weights) == 0:
            raise ConfigError(
                f"config.objective.language_weight={weights[0]}, diffusion_weight={weights[1]}",
                "use weights of at least 0, one of them above",
            )

    def _drop(self, batch: Batch, repeat: Callable[[Array], Array], u: Array) -> Array:
        return u < self.label_dropout

    def _gradients(
        self, state: TrainState, batch: Batch, variables: PyTree
    ) -> tuple[PyTree, dict[str, Array]]:
        """Adds each row's weights in the whole batch's means, times the micro-batches."""
        tokens = jnp.sum(supervised(batch["targets"]), dtype=jnp.float32)
        answers = jnp.sum(is_answer(batch["tokens"], batch["targets"]), dtype=jnp.float32)
        rows = jnp.ones(batch["index"].shape[0]) * self.accumulate
        weights = {
            "language_weight": self.language_weight * rows / jnp.maximum(tokens, 1),
            "diffusion_weight": self.diffusion_weight * rows / (answers + _EPS),
        }
        return super()._gradients(state, {**batch, **weights}, variables)

    def _micro_step(
        self, state: TrainState, batch: Batch, variables: PyTree
    ) -> tuple[PyTree, dict[str, Array]]:
        x1, inputs = self._random_inputs(state.step, batch, variables)

        def loss(params: Params) -> tuple[Array, JointLosses]:
            losses = joint_losses(
                self.model,
                self.objective,
                self.optimizer.freeze_params(params),
                batch,
                x1,
                inputs,
                self.max_targets,
                with_language=self.language_weight > 0,
            )
            total = losses.language.total @ batch["language_weight"]
            images = _per_image(losses) * losses.answers
            return total + images @ batch["diffusion_weight"], losses

        grads, losses = jax.grad(loss, has_aux=True)(state.params)
        counted = jnp.repeat(losses.answers, self.times)
        bin_loss, bin_count = bin_losses(losses.diffusion, inputs.t, self.num_time_bins, counted)
        sums = {
            "language_loss": jnp.sum(losses.language.total),
            "supervised_tokens": jnp.sum(losses.language.tokens),
            "diffusion_loss": _per_image(losses) @ losses.answers,
            "answer_images": jnp.sum(losses.answers),
            "dropped_labels": jnp.sum(inputs.labels, dtype=jnp.float32) / self.times,
            "bin_loss": bin_loss,
            "bin_count": bin_count,
        }
        return self._divide(grads), sums

    def _means(self, sums: dict[str, Array], size: int) -> Metrics:
        language = sums["language_loss"] / jnp.maximum(sums["supervised_tokens"], 1)
        diffusion = sums["diffusion_loss"] / (sums["answer_images"] + _EPS)
        loss = self.language_weight * language + self.diffusion_weight * diffusion
        return {
            **sums,
            "loss": loss,
            "language_loss": language,
            "diffusion_loss": diffusion,
            "dropped_labels": sums["dropped_labels"] / size,
        }
