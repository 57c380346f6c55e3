"""Files of prompts."""

import json
import os
from pathlib import Path
from typing import Any

from dsr_jax.core.errors import DataError


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Reads the prompts of a file.

    Args:
      path: `.jsonl` with an object per line that has the key `prompt`, as GenEval's metadata; any
        other file has a prompt per line.

    Raises:
      DataError: If the file cannot be read or has no prompts, or a line of it holds none.
    """
    path = Path(path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", "name a text file in UTF-8") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise DataError(f"{path} holds no prompts", "write one per line")
    return [_prompt(path, number, line) for number, line in enumerate(lines, start=1)]


def _prompt(path: Path, number: int, line: str) -> str:
    found: Any = line
    if path.suffix == ".jsonl":
        try:
            found = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path}, line {number}: no JSON object with the key prompt",
                'write lines such as {"prompt": "a photo of a cow"}',
            ) from error
    if not isinstance(found, str) or not found.strip():
        raise DataError(f"{path}, line {number} is empty", "write a prompt or delete the line")
    return found.strip()
