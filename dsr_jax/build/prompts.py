"""Builds the tokenizer of prompts that a config names."""

from dsr_jax.core.prompts import PromptTokenizer
from dsr_jax.core.tokenizers import FolderTokenizer
from dsr_jax.data import shapes


def make_prompt_tokenizer(name: str) -> PromptTokenizer:
    """Returns the tokenizer called `name`.

    Args:
      name: "shapes" for the words of the captioned shapes, or a folder with the tokenizer of a Qwen
        chat model.

    Raises:
      DataError: If the folder holds no such tokenizer.
    """
    if name == "shapes":
        return shapes.make_tokenizer()
    return PromptTokenizer(FolderTokenizer(name))
