"""Images with captions as training records: image, tokens and targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dsr_jax.core.errors import PromptError, UnreadableRecord
from dsr_jax.core.prompts import REQUEST, PromptTokenizer, Turn
from dsr_jax.data.base import Record


class CaptionSource(Protocol):
    """Images and captions by index; the same index gives the same record in every process.

    Attributes:
      name: Name in logs and provenance.
      image_shape: Height, width and channels of every image.
      fingerprint: Digest of the listing, see `classes.describe`.
    """

    name: str
    image_shape: tuple[int, int, int]
    fingerprint: str

    def __len__(self) -> int: ...

    def image(self, index: int) -> np.ndarray:
        """Returns the image of record `index`, uint8 [H, W, C]."""

    def caption(self, index: int) -> str | list[Turn]:
        """Returns the caption of record `index`, or a conversation with the image as its answer."""

    def origin(self, index: int) -> str:
        """Returns the file and line of record `index`, for error messages."""


class TokenizedCaptions:
    """Data source of images with the tokens and targets of their captions.

    Args:
      source: Images and captions.
      tokenizer: Makes the sequences.
      n_queries: Slots of an answer image.
      length: Length of every sequence.
      requests: Phrases around captions that are no conversations; record i takes the i-th, in turn.

    Attributes:
      caption_length: Length of every sequence.
      skipped: Number of records that the source left out.
    """

    num_classes = 0

    def __init__(
        self,
        source: CaptionSource,
        tokenizer: PromptTokenizer,
        n_queries: int,
        length: int,
        requests: Sequence[str] = (REQUEST,),
    ) -> None:
        self._source = source
        self._tokenizers = [dataclasses.replace(tokenizer, request=each) for each in requests]
        self._n_queries, self.caption_length = n_queries, length
        self.name, self.image_shape = source.name, source.image_shape
        self.fingerprint = source.fingerprint
        self.skipped: int = getattr(source, "skipped", 0)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        """Reads one image, and encodes its caption to int32 "tokens" and "targets" [length].

        Raises:
          UnreadableRecord: Naming file and line, if the caption cannot be encoded or the image's
            content is damaged.
          DataError: If a file cannot be read at all.
        """
        caption, sizes = self._source.caption(index), (self._n_queries, self.caption_length)
        tokenizer = self._tokenizers[index % len(self._tokenizers)]
        try:
            if isinstance(caption, str):
                tokens, targets = tokenizer.encode_training(caption, *sizes)
            else:
                tokens, targets = tokenizer.encode_conversation(caption, *sizes)
        except PromptError as error:
            raise UnreadableRecord(
                f"{self._source.origin(index)}: {error.problem}",
                f"{error.remedy}, or set config.data.on_corrupt=skip",
            ) from error
        return {"image": self._source.image(index), "tokens": tokens, "targets": targets}
