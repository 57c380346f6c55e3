"""The classes of a data source: their names, labels and counts, as a run's folder records them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from dsr_jax.core.errors import DataError, DsrError
from dsr_jax.core.files import read_json, write_json
from dsr_jax.data.base import Source

FILE = "class_names.json"
_SHOWN = 8


class DataDescription(TypedDict):
    """Description of a data source's classes, as JSON values.

    Attributes:
      source: The source's name.
      images: Number of records.
      names: Class name by label; empty where the source has no names.
      counts: Records by label; empty where the source does not count them.
      fingerprint: Digest of the listing: equal for equal files in equal order, wherever they are.
      skipped: Number of records that cannot be used and were left out, if any were.
    """

    source: str
    images: int
    names: list[str]
    counts: list[int]
    fingerprint: str
    skipped: NotRequired[int]


def describe(source: Source) -> DataDescription:
    """Returns what `source` holds.

    Uses the optional attributes `class_names`, `class_counts`, `fingerprint` and `skipped` of a
    source.
    """
    names = [str(name) for name in getattr(source, "class_names", ())]
    counts = [int(count) for count in getattr(source, "class_counts", ())]
    listing = getattr(source, "fingerprint", "") or fingerprint([str(len(source)), *names])
    found: DataDescription = {
        "source": source.name,
        "images": len(source),
        "names": names,
        "counts": counts,
        "fingerprint": listing,
    }
    if skipped := getattr(source, "skipped", 0):
        found["skipped"] = int(skipped)
    return found


def fingerprint(lines: Iterable[str]) -> str:
    """Returns the SHA-256 of a listing, "sha256:..."."""
    total = hashlib.sha256()
    for line in lines:
        total.update(line.encode(errors="surrogateescape") + b"\n")
    return "sha256:" + total.hexdigest()


def write_class_names(folder: str | os.PathLike[str], description: DataDescription) -> None:
    """Writes `description` as class_names.json into a run's folder."""
    write_json(Path(folder) / FILE, description)


def read_class_names(folder: str | os.PathLike[str]) -> DataDescription | None:
    """Reads the class_names.json of a run's folder; None if it has none.

    Raises:
      DataError: If the file is damaged.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return None
    try:
        found = read_json(path)
    except (OSError, ValueError, RecursionError, DsrError) as error:
        raise DataError(f"{path} cannot be read: {error}", _REMEDY) from error
    if not is_description(found):
        raise DataError(f"{path} does not hold names, counts and a fingerprint", _REMEDY)
    description: DataDescription = {
        "source": str(found.get("source", "")),
        "images": int(found.get("images", 0)),
        "names": found["names"],
        "counts": found["counts"],
        "fingerprint": found["fingerprint"],
    }
    if skipped := found.get("skipped", 0):
        description["skipped"] = int(skipped)
    return description


_REMEDY = "delete it: the next start of the run writes it again"


def is_description(found: Any) -> bool:
    """Whether JSON values have the form of a `DataDescription`."""

    def is_list(key: str, kind: type) -> bool:
        values = found.get(key)
        return isinstance(values, list) and all(type(value) is kind for value in values)

    return (
        isinstance(found, dict)
        and is_list("names", str)
        and is_list("counts", int)
        and isinstance(found.get("fingerprint"), str)
        and all(map(_is_text, (*found["names"], found["fingerprint"])))
        and all(type(found.get(key, 0)) is int for key in ("images", "skipped"))
        and (
            not found["names"] or not found["counts"] or len(found["names"]) == len(found["counts"])
        )
    )


def _is_text(value: str) -> bool:
    """Whether a string can be written: JSON can hold halves of characters."""
    try:
        value.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def trained_labels(description: DataDescription, num_classes: int) -> list[int]:
    """Returns the labels of a table of `num_classes` that the data set has images of.

    All of them where the source has neither names nor counts.
    """
    names, counts = description["names"], description["counts"]
    if counts:
        return [label for label, count in enumerate(counts[:num_classes]) if count]
    return list(range(min(len(names), num_classes) if names else num_classes))


def label_of(description: DataDescription, name: str) -> int:
    """Returns the label of the class called `name`.

    Raises:
      DataError: If there is no such class.
    """
    names = description["names"]
    if not name or name not in names:
        raise DataError(
            f"no class is called {name!r} among the {len(names)} of {description['source']}",
            f"choose from {_shorten(names)}" if names else "give labels as numbers",
        )
    return names.index(name)


def warnings_of(description: DataDescription, num_classes: int) -> list[str]:
    """Returns warnings about the classes, to be shown before training.

    Args:
      description: The data.
      num_classes: Rows of the model's label table.
    """
    found = []
    trained = set(trained_labels(description, num_classes))
    untrained = [label for label in range(num_classes) if label not in trained]
    if untrained:
        rows = max(trained, default=0) + 1
        found.append(
            f"{description['source']} has images of {len(trained)} classes, the label table "
            f"{num_classes} rows: {len(untrained)} rows stay untrained ({_ranges(untrained)}); "
            f"set config.data.num_classes={rows}, or sample the trained classes alone"
        )
    names = description["names"]
    if all(name.isdecimal() for name in names) and names == sorted(names):
        moved = [label for label, name in enumerate(names) if int(name) != label]
        if moved and sorted(names, key=int) != names:
            label = moved[0]
            found.append(
                f"the class names of {description['source']} are numbers, but labels follow the "
                f"order of strings: class {names[label]!r} has label {label}; a file of names in "
                "the order that you want, as config.data.class_map, makes label and name agree"
            )
    return found


def compare(old: DataDescription, new: DataDescription) -> list[str]:
    """Returns how a data set differs from what it was; empty if it does not.

    Each line names a class or a count: of changed labels every image of a run would change meaning.
    """
    before, after = old["names"], new["names"]
    lines = [f"class {n!r} (label {before.index(n)}) vanished" for n in before if n not in {*after}]
    lines += [f"class {n!r} (label {after.index(n)}) appeared" for n in after if n not in {*before}]
    labels = {name: label for label, name in enumerate(before)}
    lines += [
        f"class {name!r}: label {labels[name]} -> {label}"
        for label, name in enumerate(after)
        if labels.get(name, label) != label
    ]
    if before == after and old["counts"] and new["counts"]:
        pairs = zip(old["counts"], new["counts"], strict=False)
        lines += [
            f"class {after[label] if after else label!r}: {was} -> {now} images"
            for label, (was, now) in enumerate(pairs)
            if was != now
        ]
    if old["images"] != new["images"]:
        lines.append(f"images: {old['images']} -> {new['images']}")
    if not lines and old["fingerprint"] != new["fingerprint"]:
        lines.append("files of the data set were renamed, or others took their place")
    return lines


def _ranges(labels: Sequence[int]) -> str:
    """Writes sorted numbers as "3-9, 12"."""
    parts: list[list[int]] = []
    for label in labels:
        if parts and parts[-1][1] == label - 1:
            parts[-1][1] = label
        else:
            parts.append([label, label])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in parts]
    return _shorten(texts)


def _shorten(texts: Sequence[str]) -> str:
    more = f", ... ({len(texts)} in all)" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more
