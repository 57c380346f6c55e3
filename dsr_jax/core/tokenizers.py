"""Tokenizers of prompts: a Hugging Face folder that is read offline, or a list of words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dsr_jax.core.errors import DataError, PromptError

if TYPE_CHECKING:
    import tokenizers

IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"
"""Words around an image's slots, which are added to the language model's own vocabulary."""
CHAT_WORDS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Control words of Qwen's chat format."""


class TextTokenizer(Protocol):
    """Token ids of a text.

    Attributes:
      name: Name in logs and errors.
      vocab_size: Rows that a table of embeddings needs: the tokenizer's entries, with the two words
        around an image.
      pad_id: Id that fills sequences up.
      control_words: Words that stand for one id each and that a prompt must not hold.
    """

    name: str
    vocab_size: int
    pad_id: int
    control_words: frozenset[str]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, in which control words become their ids."""

    def id_of(self, word: str) -> int:
        """Returns the id of a control word."""


class WordTokenizer:
    """One id per word of a fixed list, for captions with a small vocabulary.

    Ids: 0 pads, 1 and 2 are the words around an image, then the list in its order.

    Args:
      words: The words, in lower case.
    """

    pad_id = 0

    def __init__(self, words: Sequence[str]) -> None:
        self.name = f"{len(words)} words"
        self._ids = {word: i for i, word in enumerate(("<pad>", IMAGE_START, IMAGE_END, *words))}
        if len(self._ids) != len(words) + 3:
            raise DataError("the list of words holds a word twice", "give every word once")
        self.control_words = frozenset(("<pad>", IMAGE_START, IMAGE_END))
        self.vocab_size = len(self._ids)
        self.words = tuple(words)

    def id_of(self, word: str) -> int:
        return self._ids[word]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the words, which spaces, commas and full stops separate.

        Raises:
          PromptError: If a word is not in the list.
        """
        words = re.split(r"[\s,.]+", text.lower())
        found = [word for word in words if word]
        if unknown := [word for word in found if word not in self._ids]:
            raise PromptError(
                f"{', '.join(map(repr, unknown[:5]))} of {_shorten(text)} is not in the vocabulary",
                f"use its words: {', '.join(self.words)}",
            )
        return [self._ids[word] for word in found]


class FolderTokenizer:
    """Qwen's tokenizer from a folder as `save_pretrained` writes it, without the network.

    The two words around an image are added if the folder lacks them, after its last entry.

    Args:
      folder: Holds tokenizer.json and, for another class than the fast one, the files it needs.

    Raises:
      DataError: If the folder or `transformers` is missing, or the tokenizer is not of a Qwen chat
        model.
    """

    def __init__(self, folder: str | Path) -> None:
        self.name = str(folder)
        self._tokenizer = read_tokenizer(Path(folder))
        missing = [word for word in CHAT_WORDS if self._tokenizer.token_to_id(word) is None]
        if missing or len(self.encode("\n")) != 1:
            what = f"lacks {', '.join(missing)}" if missing else "has no id for a line break"
            raise DataError(
                f"the tokenizer in {folder} is of another model than Qwen: it {what}",
                "name the tokenizer folder of the language model, such as Qwen2.5-1.5B-Instruct",
            )
        self._tokenizer.add_special_tokens([IMAGE_START, IMAGE_END])
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.pad_id = self.id_of("<|endoftext|>")
        self.control_words = frozenset(
            token.content for token in self._tokenizer.get_added_tokens_decoder().values()
        )

    def id_of(self, word: str) -> int:
        found = self._tokenizer.token_to_id(word)
        assert found is not None, word
        return found

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """Returns the fast tokenizer of a folder, read without the network.

    Raises:
      DataError: If it cannot be read.
    """
    remedy = "name a folder with tokenizer.json, as save_pretrained of the language model writes it"
    if not folder.is_dir():
        raise DataError(f"the tokenizer folder {folder} does not exist", remedy)
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ImportError as error:
        raise DataError(
            f"the tokenizer in {folder} needs transformers", "pip install 'dsr_jax[hub]'"
        ) from error
    try:
        if (folder / "tokenizer_config.json").is_file():
            found: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        else:
            path = folder / "tokenizer.json"
            found = PreTrainedTokenizerFast(tokenizer_file=str(path))
        return found.backend_tokenizer
    # transformers and tokenizers raise many kinds, some of them `Exception` itself.
    except Exception as error:  # noqa: BLE001
        raise DataError(f"the tokenizer in {folder} cannot be read: {error}", remedy) from error


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
