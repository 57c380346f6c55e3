"""Token sequences in which the language model itself writes the answer up to the image.

Source: Scale-RAE's inference; spec t2i 2.1.
"""

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

MAX_NEW_TOKENS = 512
"""Words that an answer may have before its image, as in the original."""


def write_answers(
    config: ConfigDict, model: TextToImage, params: Params, prompts: Sequence[str]
) -> np.ndarray:
    """Continues prompts by the likeliest token until the image begins.

    Every token costs a pass over the whole batch.

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
    read = make_text_model(model)
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

    @jax.jit
    def likeliest(params: Params, tokens: Array, ends: Array) -> Array:
        hidden: Any = read.read(params, tokens, None, None).hidden
        last = jnp.take_along_axis(hidden, (ends - 1)[:, None, None], axis=1)[:, 0]
        return jnp.argmax(read.logits(params, last), axis=-1)

    writing, rows = np.ones(len(prompts), bool), np.arange(len(prompts))
    for _ in range(MAX_NEW_TOKENS):
        found = np.asarray(likeliest(params, tokens, ends))
        tokens[rows[writing], ends[writing]] = found[writing]
        ends = ends + writing
        begun = writing & (found == tokenizer.image_start_id)
        for row in rows[begun]:
            tokens[row, ends[row] : ends[row] + slots] = IMAGE_SLOT
        writing &= ~begun & (ends + slots < length)
        if not writing.any():
            break
    return tokens
