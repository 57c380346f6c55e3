"""Token sequences in which the language model itself writes the answer up to the image.

Source: Scale-RAE's inference; spec t2i 2.1.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.build.prompts import make_prompt_tokenizer
from dsr_jax.build.text_to_image import make_text_model
from dsr_jax.config import ConfigDict
from dsr_jax.core.errors import PromptError
from dsr_jax.core.prompts import IMAGE_SLOT
from dsr_jax.core.typing import Array, Params
from dsr_jax.models.text_to_image import TextToImage
from dsr_jax.parallel.shardings import fetch
from dsr_jax.sampling.batch import fixed_batch

MAX_NEW_TOKENS = 512
"""Words that an answer may have before its image, as in the original."""


def write_answers(
    config: ConfigDict, model: TextToImage, params: Params, prompts: Sequence[str]
) -> np.ndarray:
    """Continues prompts by the likeliest token until the image begins.

    Every token costs a pass over config.sample.batch prompts at a time.

    Args:
      config: Experiment config.
      model: The model.
      params: Its parameters.
      prompts: The prompts.

    Returns:
      Tokens [number of prompts, L], int32. A row without image slots did not come to an image
      within the sequence's length or MAX_NEW_TOKENS tokens.

    Raises:
      PromptError: Naming the prompt that is empty, too long, or holds control words.
    """
    tokenizer = make_prompt_tokenizer(config.language.tokenizer)
    length, slots = config.language.max_length, model.num_slots
    tokens = np.full((len(prompts), length), tokenizer.pad_id, np.int32)
    ends = np.zeros(len(prompts), np.int32)
    for row, prompt in enumerate(prompts):
        try:
            prefix = tokenizer.encode_prefix(prompt)
        except PromptError as error:
            raise PromptError(f"prompt {row + 1}: {error.problem}", error.remedy) from error
        if len(prefix) + 1 + slots > length:
            raise PromptError(
                f"prompt {row + 1} takes {len(prefix)} tokens, beside {slots} image slots and one "
                f"token of an answer, of {length}",
                "shorten it, or set config.language.max_length higher",
            )
        tokens[row, : len(prefix)], ends[row] = prefix, len(prefix)

    size = min(max(len(prompts), 1), fixed_batch(config.sample.batch))
    for first in range(0, len(prompts), size):
        # The last group is filled up by its first prompts, so that all have one shape.
        rows = np.resize(np.arange(first, min(first + size, len(prompts))), size)
        tokens[rows] = _continue(model, params, tokens[rows], ends[rows], tokenizer.image_start_id)
    return tokens


def _continue(
    model: TextToImage, params: Params, tokens: np.ndarray, ends: np.ndarray, image_start: int
) -> np.ndarray:
    """Returns tokens [B, L] that are continued from the lengths [B] of their prompts."""
    length, slots = tokens.shape[1], model.num_slots
    writing, rows = np.ones(len(tokens), bool), np.arange(len(tokens))
    for _ in range(MAX_NEW_TOKENS):
        found = fetch(_likeliest(model, params, tokens, ends))
        tokens[rows[writing], ends[writing]] = found[writing]
        ends = ends + writing
        begun = writing & (found == image_start)
        for row in rows[begun]:
            tokens[row, ends[row] : ends[row] + slots] = IMAGE_SLOT
        writing &= ~begun & (ends + slots < length)
        if not writing.any():
            break
    return tokens


@functools.partial(jax.jit, static_argnums=0)
def _likeliest(model: TextToImage, params: Params, tokens: Array, ends: Array) -> Array:
    """Returns the likeliest tokens [B] behind those before `ends`; compiled once per shape."""
    functions = make_text_model(model)
    hidden: Any = functions.read(params, tokens, None, None).hidden
    last = jnp.take_along_axis(hidden, (ends - 1)[:, None, None], axis=1)[:, 0]
    return jnp.argmax(functions.logits(params, last), axis=-1)
