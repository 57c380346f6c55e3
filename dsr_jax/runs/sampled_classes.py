"""Classes of a run's samples, by label or name."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dsr_jax.build.fine_tuning import names_of_record
from dsr_jax.config import ConfigDict
from dsr_jax.convert.files import read_conversion
from dsr_jax.core.errors import DataError
from dsr_jax.data.classes import DataDescription, label_of, trained_labels


def classes_to_sample(config: ConfigDict, data: DataDescription | None) -> list[int]:
    """Returns the labels to sample unless others are named.

    They are those that training had images of; all of the table if config.sample.all_classes, or if
    the classes of the training data are not known.

    Args:
      config: The run's config.
      data: Classes of the training data; None for weights without a run's folder.
    """
    rows = config.data.num_classes
    if data is None or config.sample.all_classes:
        return list(range(rows))
    return trained_labels(data, rows)


def classes_of_converted(folder: Path) -> DataDescription | None:
    """Returns the classes that a converted folder records; None without names, as official ones."""
    names = list(names_of_record(read_conversion(folder)))
    if not names:
        return None
    return {"source": str(folder), "images": 0, "names": names, "counts": [], "fingerprint": ""}


def parse_classes(text: str, data: DataDescription | None) -> list[int]:
    """Reads a comma-separated list of labels and class names.

    A number is a label; `name:7` is the class called "7".

    Args:
      text: For example "3,7" or "cat,dog".
      data: The run's classes; None for weights without a run's folder.

    Raises:
      DataError: If a name is unknown, or a number is the name of one class and the label of
        another.
    """
    return [_parse_class(word.strip(), data) for word in text.split(",")]


def _parse_class(word: str, data: DataDescription | None) -> int:
    names = data["names"] if data else []
    kind, colon, rest = word.partition(":")
    if colon and kind == "label" and _is_number(rest):
        return int(rest)
    if colon and kind == "name":
        word = rest
    elif _is_number(word):
        label = int(word)
        if word in names and names.index(word) != label:
            other = f"is class {names[label]!r}" if 0 <= label < len(names) else "has no name"
            raise DataError(
                f"--classes: {word} is a label and a name: label {word} {other}, and the class "
                f"called {word!r} has label {names.index(word)}",
                f"write label:{word} or name:{word}",
            )
        return label
    if data is None or not names:
        raise DataError(
            f"--classes: no class is called {word!r}, since the weights come without class names",
            "give labels as numbers",
        )
    return label_of(data, word)


def _is_number(word: str) -> bool:
    return word.removeprefix("-").isdecimal()


def class_notes(data: DataDescription | None, labels: Iterable[int]) -> dict[str, Any]:
    """Returns the entry {"class_names": {label: name}} of a record of samples, or {}."""
    names: Sequence[str] = data["names"] if data else ()
    found = {str(label): names[label] for label in sorted(set(labels)) if label < len(names)}
    return {"class_names": found} if found else {}
