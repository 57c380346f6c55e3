"""Compares score files: checks of their recipes, a table, a plot of FID against guidance."""

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsr_jax.core.errors import EvaluationError
from dsr_jax.core.files import read_json
from dsr_jax.core.trees import flatten_names

_FIRST = ("fid", "sfid", "fd_dinov2", "inception_score", "precision", "recall", "kid")
_OF_ALL = (
    *("arithmetic", "reference", "reference_preprocessing", "num_samples", "image_shape"),
    *("labels", "rounding"),
)
"""Sections that every recipe has; others are of a metric or of its network."""
_SETTINGS = ("step", "ema", "guidance", "interval", "method", "num_points")


@dataclass(frozen=True)
class Scores:
    """Score file that python -m dsr_jax.evaluate wrote.

    Attributes:
      name: Name in tables.
      scores: Numbers by name.
      recipe: Settings that must be equal for scores to be comparable.
      sampling: Step, EMA, guidance and sampler, as far as the samples' record has them.
      packages: Versions that computed the scores.
    """

    name: str
    scores: dict[str, float]
    recipe: dict[str, Any]
    sampling: dict[str, Any]
    packages: dict[str, str]


def shown(names: Iterable[str]) -> list[str]:
    """Returns names of scores in the order in which they are shown, without spreads ("kid_std")."""
    given = dict.fromkeys(name for name in names if not name.endswith("_std"))
    return [*(name for name in _FIRST if name in given), *(n for n in given if n not in _FIRST)]


def read_scores(path: str | os.PathLike[str]) -> Scores:
    """Reads a file of scores.

    Raises:
      EvaluationError: If it is missing, or no scores against a reference.
    """
    path = Path(path)
    try:
        content = read_json(path)
        scores, recipe = dict(content["scores"]), dict(content["recipe"])
        record = (content["samples"].get("record") or {}).get("recipe") or {}
        values = {**record, **record.get("sampler", {})}
        packages = dict(content.get("provenance", {}).get("packages", {}))
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read: {error}", "check the path") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"{path} holds no scores with their recipe",
            "give files that python -m dsr_jax.evaluate wrote with --reference",
        ) from error
    sampling = {key: values[key] for key in _SETTINGS if key in values}
    name = path.name.removesuffix(".json").removesuffix(".scores")
    return Scores(name, scores, recipe, sampling, packages)


def differences(all_scores: Sequence[Scores]) -> dict[str, list[Any]]:
    """Returns the recipe entries that differ between files, with each file's value.

    Settings of a metric count only between files that have that metric.
    """
    flat = [_flat(scores.recipe) for scores in all_scores]
    found = {}
    for key in dict.fromkeys(key for recipe in flat for key in recipe):
        section = key.partition("/")[0]
        holders = [
            r
            for r, s in zip(flat, all_scores, strict=True)
            if section in _OF_ALL or section in s.recipe
        ]
        if len({str(recipe.get(key)) for recipe in holders}) > 1:
            found[key] = [recipe.get(key) for recipe in flat]
    return found


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Names below names; lists count as one value."""
    texts = {key: str(x) if isinstance(x, list) or x is None else x for key, x in recipe.items()}
    return flatten_names(texts)


def check_comparable(all_scores: Sequence[Scores]) -> None:
    """Checks that scores were computed by one recipe.

    Raises:
      EvaluationError: Listing what differs.
    """
    if found := differences(all_scores):
        lines = [f"{key}: {' | '.join(map(str, values))}" for key, values in found.items()]
        raise EvaluationError(
            "these scores were computed by different recipes:\n    " + "\n    ".join(lines),
            "score the samples again by one recipe, or compare them with --force",
        )


def make_table(all_scores: Sequence[Scores]) -> list[list[str]]:
    """Returns rows of cells: a heading, then a row per file; empty columns are left out."""
    settings = [key for key in _SETTINGS if any(key in s.sampling for s in all_scores)]
    metrics = shown(key for s in all_scores for key in s.scores)
    rows = [["scores", *settings, *metrics]]
    for scores in all_scores:
        cells = [str(scores.sampling.get(key, "")) for key in settings]
        values = [f"{scores.scores[key]:.4f}" if key in scores.scores else "" for key in metrics]
        rows.append([scores.name, *cells, *values])
    return rows


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Returns the table in aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def as_csv(rows: Sequence[Sequence[str]]) -> str:
    """Returns the table as comma-separated values."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def plot_guidance(
    all_scores: Sequence[Scores], path: str | os.PathLike[str], note: str = ""
) -> int:
    """Plots FID against guidance, a line for each set of other settings.

    Args:
      all_scores: The files.
      path: The picture.
      note: Title, that recipes differ, for example.

    Returns:
      Number of points.

    Raises:
      EvaluationError: If no file has both FID and a guidance.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for scores in all_scores:
        if "fid" in scores.scores and "guidance" in scores.sampling:
            rest = {key: x for key, x in scores.sampling.items() if key != "guidance"}
            # An interval means nothing without guidance, so that recipes leave it out there.
            rest.pop("interval", None)
            label = ", ".join(f"{key} {value}" for key, value in rest.items())
            point = (float(scores.sampling["guidance"]), scores.scores["fid"])
            lines.setdefault(label, []).append(point)
    if not lines:
        raise EvaluationError(
            "no file has both FID and a guidance",
            "plot scores of samples of python -m dsr_jax.sample, whose record has it",
        )
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label or "samples")
    axes.set_xlabel("guidance")
    axes.set_ylabel("FID")
    axes.set_title(note, fontsize=9)
    axes.legend(fontsize=7)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return sum(map(len, lines.values()))
