"""Labels of class names: in the order of strings, or from a class-map file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsr_jax.core.errors import DataError

MAX_BYTES = 2**24
MAX_LABEL = 2**20


def labels_of(names: Sequence[str], class_map: str = "") -> dict[str, int]:
    """Returns label by class name.

    Args:
      names: The classes that a data set has.
      class_map: A file that `read_class_map` reads; "" for the order of strings.

    Returns:
      All classes of the map, of which some may be missing in the data set.

    Raises:
      DataError: If the file is wrong, or a class is missing in it.
    """
    if not class_map:
        return {name: label for label, name in enumerate(sorted(names))}
    labels = read_class_map(class_map)
    missing = sorted(set(names) - set(labels))
    if missing:
        raise DataError(
            f"class map {class_map} lacks {len(missing)} classes of the data set: "
            f"{', '.join(missing[:8])}",
            "add them to that file",
        )
    return labels


def names_by_label(labels: Mapping[str, int]) -> list[str]:
    """Returns class name by label, "" for a label that no class has."""
    names = [""] * (max(labels.values(), default=-1) + 1)
    for name, label in labels.items():
        names[label] = name
    return names


def read_class_map(path: str | Path) -> dict[str, int]:
    """Reads label by class name.

    Args:
      path: A JSON file of {"name": label, ...} or ["name of label 0", ...], or else a text file of
        one name per line, in the order of their labels from 0.

    Raises:
      DataError: If the file is missing, too large or damaged, or names or labels occur twice.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"class map {path} has more than {MAX_BYTES} bytes", _REMEDY)
        text = path.read_text(encoding="utf-8-sig")
        found = (
            json.loads(text, object_pairs_hook=_Pairs) if path.suffix == ".json" else _lines(text)
        )
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"class map {path} cannot be read: {error}", _REMEDY) from error
    if isinstance(found, _Pairs):
        pairs = list(found)
    else:
        pairs = [(n, label) for label, n in enumerate(found)] if isinstance(found, list) else []
    if not pairs:
        raise DataError(f"class map {path} holds no classes", _REMEDY)
    labels: dict[str, int] = {}
    used: dict[int, str] = {}
    for name, label in pairs:
        if not isinstance(name, str) or not name:
            raise DataError(f"class map {path}: the name of label {label} is {name!r}", _REMEDY)
        if type(label) is not int or not 0 <= label < MAX_LABEL:
            raise DataError(
                f"class map {path}: the label of {name!r} is {label!r}",
                f"labels are whole numbers from 0 to {MAX_LABEL - 1}",
            )
        if name in labels or label in used:
            other = f"label {labels[name]}" if name in labels else f"class {used[label]!r}"
            raise DataError(
                f"class map {path}: class {name!r}, label {label}, is there twice: also {other}",
                _REMEDY,
            )
        labels[name], used[label] = label, name
    return labels


_REMEDY = 'write one class name per line, or JSON of {"name": label, ...} in a .json file'


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with all of its keys, repeated ones included."""


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
