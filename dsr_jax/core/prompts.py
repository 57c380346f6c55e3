"""Token sequences of prompts and conversations: chat format, image slots and label mask.

An answer image is N slots, all with the id `IMAGE_SLOT`, between the words `<im_start>` and
`<im_end>`. Sequences are filled up on the right with the tokenizer's `pad_id`:

    chat    system turn | user turn | assistant turn "Here you go:\n" <im_start> slots <im_end>
    plain   prompt <im_start> slots <im_end>

Targets are the tokens themselves, `IGNORED` where no loss counts; the loss shifts them. Supervised
are the assistant's turns and, as in Scale-RAE, the line breaks and turn marks of every turn.

Source: Scale-RAE's conversation and label code; spec t2i 2.1 and 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dsr_jax.core.errors import ConfigError, PromptError
from dsr_jax.core.tokenizers import CHAT_WORDS, IMAGE_END, IMAGE_START, TextTokenizer

IMAGE_SLOT = -200
IGNORED = -100
IMAGE = "<image>"
"""Text that stands for an image in a turn."""
SYSTEM = "You are a helpful assistant."
ANSWER = f"Here you go:\n{IMAGE}"
REQUEST = "Generate an image of {}"
FORMATS = ("chat", "plain")

_ROLES = ("system", "user", "assistant")


class Turn(NamedTuple):
    """One turn of a conversation: role "system", "user" or "assistant", and its text."""

    role: str
    text: str


@dataclass(frozen=True)
class PromptTokenizer:
    """Prompts as token sequences of a fixed length.

    Attributes:
      text: Tokenizer of text.
      format: "chat" for Qwen's turns, "plain" for the prompt alone.
      request: Phrase around a prompt in the chat format, with {} in its place.
    """

    text: TextTokenizer
    format: str = "chat"
    request: str = REQUEST

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(
                f"no format of prompts is called {self.format!r}",
                f"choose from {', '.join(FORMATS)}",
            )
        if self.request.count("{}") != 1:
            raise ConfigError(
                f"the request {self.request!r} has no single {{}} for the prompt",
                f"write one, as in {REQUEST!r}",
            )

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return self.text.vocab_size

    @property
    def pad_id(self) -> int:
        """Id that fills sequences up."""
        return self.text.pad_id

    @property
    def image_start_id(self) -> int:
        """Id of `<im_start>`, after which the slots follow."""
        return self.text.id_of(IMAGE_START)

    @property
    def image_end_id(self) -> int:
        """Id of `<im_end>`."""
        return self.text.id_of(IMAGE_END)

    def check_table(self, rows: int) -> None:
        """Checks that an embedding table of `rows` rows has one for each id.

        Raises:
          ConfigError: If it has fewer.
        """
        if self.vocab_size > rows:
            raise ConfigError(
                f"the tokenizer {self.text.name} has {self.vocab_size} ids, the embedding table "
                f"{rows} rows",
                "use the tokenizer of this language model, or resize the table to its ids",
            )

    def encode_training(
        self, prompt: str, n_queries: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encodes a prompt with its answer image.

        Args:
          prompt: Caption of the image.
          n_queries: Slots of the image.
          length: Length of the result.

        Returns:
          Tokens [length] and targets [length], int32.

        Raises:
          PromptError: If the prompt is empty, too long, or holds control words.
        """
        self._check(prompt)
        if self.format == "chat":
            turns = [Turn("user", self.request.replace("{}", prompt)), Turn("assistant", ANSWER)]
            return self.encode_conversation(turns, n_queries, length)
        words = self._words(prompt)
        tokens = [*words, self.image_start_id, IMAGE_SLOT, self.image_end_id]
        targets = [*[IGNORED] * len(words), self.image_start_id, IGNORED, self.image_end_id]
        return self._padded(tokens, targets, n_queries, length)

    def encode_request(self, prompt: str, n_queries: int, length: int) -> np.ndarray:
        """Encodes a prompt up to the last slot of the image that answers it.

        The arguments, the result's tokens and the errors are those of `encode_training`.
        """
        tokens = [*self.encode_prefix(prompt)]
        if self.format == "chat":
            tokens += self.text.encode(ANSWER.removesuffix(IMAGE))
        tokens += [self.image_start_id, IMAGE_SLOT]
        return self._padded(tokens, [IGNORED] * len(tokens), n_queries, length)[0]

    def encode_prefix(self, prompt: str) -> list[int]:
        """Returns the tokens of a prompt up to where the model's answer starts.

        Raises:
          PromptError: If the prompt is empty or holds control words.
        """
        self._check(prompt)
        if self.format == "plain":
            return self._words(prompt)
        return self.encode_turns([Turn("user", self.request.replace("{}", prompt))])[0] + (
            self.text.encode("<|im_start|>assistant\n")
        )

    def encode_conversation(
        self, turns: Sequence[Turn], n_queries: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encodes a conversation in the chat format; `IMAGE` stands for an image in its texts.

        Returns:
          Tokens [length] and targets [length], int32.

        Raises:
          PromptError: If a turn is empty, has an unknown role or holds control words, or the whole
            is too long.
        """
        if self.format != "chat":
            raise PromptError(
                "conversations need the chat format, not plain prompts",
                "use the tokenizer folder of a chat model",
            )
        for turn in turns:
            self._check(turn.text, images=True)
        return self._padded(*self.encode_turns(turns), n_queries, length)

    def encode_turns(self, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
        """Returns tokens and targets of a system turn and `turns`, with one slot per image.

        Raises:
          PromptError: If a role is unknown.
        """
        everywhere = {self.text.id_of(word) for word in CHAT_WORDS[1:]}
        everywhere |= set(self.text.encode("\n"))
        tokens: list[int] = []
        targets: list[int] = []
        for role, text in [Turn("system", SYSTEM), *turns]:
            if role not in _ROLES:
                raise PromptError(
                    f"a turn has the role {role!r}", f"choose from {', '.join(_ROLES)}"
                )
            wrapped = text.replace(IMAGE, f"{IMAGE_START}{IMAGE}{IMAGE_END}")
            parts = f"<|im_start|>{role}\n{wrapped}<|im_end|>\n".split(IMAGE)
            ids = self.text.encode(parts[0])
            for part in parts[1:]:
                ids += [IMAGE_SLOT, *self.text.encode(part)]
            own = role == "assistant"
            tokens += ids
            targets += [i if i != IMAGE_SLOT and (own or i in everywhere) else IGNORED for i in ids]
        return tokens, targets

    def _words(self, prompt: str) -> list[int]:
        if not (words := self.text.encode(prompt)):
            raise PromptError(f"the prompt {prompt!r} holds no words", "write what the image shows")
        return words

    def _padded(
        self, tokens: Sequence[int], targets: Sequence[int], n_queries: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Repeats image slots and fills up to `length`.

        Raises:
          PromptError: If the result is longer.
        """
        counts = [n_queries if token == IMAGE_SLOT else 1 for token in tokens]
        if (total := sum(counts)) > length:
            raise PromptError(
                f"the prompt takes {total} tokens with its {n_queries} image slots, of {length}",
                f"shorten it by {total - length} tokens",
            )
        filled = []
        for values, pad in ((tokens, self.pad_id), (targets, IGNORED)):
            row = np.full(length, pad, np.int32)
            row[:total] = np.repeat(np.asarray(values, np.int32), counts)
            filled.append(row)
        return filled[0], filled[1]

    def _check(self, prompt: str, images: bool = False) -> None:
        """Checks a prompt's text; with `images`, it may hold `IMAGE`.

        Raises:
          PromptError: If it is empty or holds control words.
        """
        if not prompt.strip():
            raise PromptError("the prompt is empty", "write what the image shows")
        words = self.text.control_words | (set() if images else {IMAGE})
        if found := sorted(word for word in words if word in prompt):
            raise PromptError(
                f"the prompt holds {', '.join(found)}, which the model's format uses",
                "take it out of the text",
            )


def encode_requests(
    tokenizer: PromptTokenizer, prompts: Sequence[str], n_queries: int, length: int
) -> np.ndarray:
    """Returns the tokens of requests, int32 [number of prompts, length].

    Raises:
      PromptError: Naming the prompt by its number, from 1, that cannot be encoded.
    """
    rows = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            rows.append(tokenizer.encode_request(prompt, n_queries, length))
        except PromptError as error:
            raise PromptError(f"prompt {number}: {error.problem}", error.remedy) from error
    return np.stack(rows) if rows else np.zeros((0, length), np.int32)


def answer_slots(tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns which slots belong to answer images, bool [B, T].

    An image is an answer where the target of the token before its first slot counts.

    Args:
      tokens: [B, T].
      targets: [B, T].
    """
    slots = tokens == IMAGE_SLOT
    before = np.pad(targets, ((0, 0), (1, 0)), constant_values=IGNORED)[:, :-1]
    first = slots & ~np.pad(slots, ((0, 0), (1, 0)))[:, :-1]
    starts = np.where(first, np.where(before != IGNORED, 2, 1), 0)
    # The last start at or before a slot decides for it.
    last = np.maximum.accumulate(np.where(first, np.arange(tokens.shape[1]), 0), axis=1)
    return slots & (np.take_along_axis(starts, last, axis=1) == 2)
