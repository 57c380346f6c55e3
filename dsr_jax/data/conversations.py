"""Captions and conversations of caption files: their forms, and the records that cannot be used.

A caption file's record is one of

    {"conversations": [{"from": "human", "value": "Generate a sunset"},
                       {"from": "gpt", "value": "Here you go:\n<image>"}]}
    {"caption": "a sunset"}

and a plain text file is a caption. `<image>` stands for the image, which must be an answer's:
training on images that a user shows (image understanding) is not supported.

Source: Scale-RAE's data format; spec t2i 7.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from dsr_jax.core.errors import DataError, PromptError
from dsr_jax.core.prompts import IMAGE, Turn

ROLES: Mapping[str, str] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_SHOWN = 5

_logger = logging.getLogger(__name__)

Caption = str | list[Turn]


def parse_record(text: bytes) -> tuple[Caption, list[str]]:
    """Returns the caption of a line of JSON, and the image files that it names.

    Raises:
      PromptError: If it is no JSON object, or not of the forms above.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise PromptError("is no JSON object")
    images = record.get("image", [])
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise PromptError('"image" is neither a path nor a list of paths')
    if len(images) > 1:
        raise PromptError(f"names {len(images)} images; one per sample is supported")
    if "conversations" not in record:
        return parse_caption(record.get("caption")), images
    return _conversation(record["conversations"]), images


def parse_caption(text: Any) -> str:
    """Returns a caption that is not empty.

    Raises:
      PromptError: If it is empty or no text.
    """
    if not isinstance(text, str):
        raise PromptError('has neither "conversations" nor a text as "caption"')
    if not text.strip():
        raise PromptError("the caption is empty")
    return text.strip()


def _conversation(turns: Any) -> list[Turn]:
    """Returns the turns of a conversation with one image, which is in an answer."""
    if not isinstance(turns, list) or not turns:
        raise PromptError('"conversations" is no list of turns')
    found = []
    for number, turn in enumerate(turns, start=1):
        values = turn if isinstance(turn, dict) else {}
        role, text = str(values.get("from")), values.get("value")
        if role not in ROLES or not isinstance(text, str):
            raise PromptError(f'turn {number} lacks "from" (human or gpt) or "value"')
        if not text.strip():
            raise PromptError(f"turn {number} is empty")
        found.append(Turn(ROLES[role], text))
    images = [text.count(IMAGE) * (role == "assistant") for role, text in found]
    total = sum(text.count(IMAGE) for _, text in found)
    if sum(images) != 1 or total != 1:
        raise PromptError(
            f"has {sum(images)} {IMAGE} in its answers and {total - sum(images)} elsewhere; one "
            "image, as an answer, is supported"
        )
    return found


def settle_problems(name: str, problems: Sequence[str], usable: int, on_corrupt: str) -> None:
    """Raises or logs what is wrong with records of a data set.

    Args:
      name: Name of the data set.
      problems: File, line and problem of each record that cannot be used.
      usable: Number of the others.
      on_corrupt: "error" or "skip".

    Raises:
      DataError: If there are problems and they are not to be skipped, or no record is usable.
    """
    shown = "; ".join(problems[:_SHOWN])
    if len(problems) > _SHOWN:
        shown += f"; and {len(problems) - _SHOWN} more"
    if problems and (on_corrupt != "skip" or not usable):
        raise DataError(
            f"{len(problems)} of {len(problems) + usable} records of {name} cannot be used: "
            f"{shown}",
            "repair them, or set config.data.on_corrupt=skip"
            if usable
            else "check that it is in a layout of docs/data.md",
        )
    if problems:
        _logger.warning(
            "skipped %d of %d records of %s: %s",
            *(len(problems), len(problems) + usable, name, shown),
        )
    if not usable:
        raise DataError(f"{name} holds no captioned images", "see the layouts in docs/data.md")
