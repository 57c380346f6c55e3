"""Builds text-to-image models and their training step from a config."""

from typing import Any

from dsr_jax.core.typing import Array, Params
from dsr_jax.models.conditioning import TextCondition
from dsr_jax.models.text_to_image import TextToImage
from dsr_jax.training.text_step import TextModel


def make_text_model(model: TextToImage) -> TextModel:
    """Returns the functions of a model that the training step and the sampler call."""

    def apply(params: Params, *args: Any, method: str) -> Any:
        return model.apply({"params": params}, *args, method=method)

    def read(params: Params, tokens: Array, targets: Array | None, latents: Array | None) -> Any:
        return apply(params, tokens, targets, latents, method="read")

    def logits(params: Params, hidden: Array) -> Array:
        return apply(params, hidden, method="logits")

    def denoise(params: Params, x: Array, t: Array, rows: Array, dropped: Array) -> Array:
        return apply(params, x, t, TextCondition(rows, dropped), method="denoise")

    return TextModel(read, logits, denoise)
