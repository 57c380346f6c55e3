"""Reports a search for register neurons as a table, JSON, figures and one HTML page."""

from __future__ import annotations

import importlib.util
import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.files import write_atomic, write_json
from dsr_jax.registers.search import Round, SearchResult, rank_neurons
from dsr_jax.reports.page import make_page, picture, table, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 0.999, 1.0)
_TOP_SCORES = 200
_PICTURES = 6


def check_plotting() -> None:
    """Checks that matplotlib, which plots the figures, is installed.

    Raises:
      ConfigError: If it is not.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "the report's figures need matplotlib, which is not installed",
            "pip install 'dsr_jax[plots]'",
        )


def outlier_table(result: SearchResult) -> str:
    """Returns the number of outlier patches before and after each round, as lines of text."""
    rows = [("round", "threshold", "images with outliers", "outliers before", "outliers after")]
    for number, found in enumerate(result.rounds, start=1):
        before, after = _outliers(found)
        images = f"{found.counted} of {len(found.norms)}"
        rows.append((str(number), f"{found.threshold:.4g}", images, str(before), str(after)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(x.rjust(w) for x, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(lines)


def _outliers(found: Round) -> tuple[int, int]:
    """Returns the outlier patches before and after a round."""
    before, after = (found.norms > found.threshold, found.norms_after > found.threshold)
    return int(before.sum()), int(after.sum())


def summarize(result: SearchResult) -> dict[str, Any]:
    """Returns the search in numbers, as JSON values."""
    neurons = result.neurons
    return {
        "ended": result.ended,
        "neurons": {str(block): units for block, units in neurons.items()},
        "distinct_neurons": sum(len(set(units)) for units in neurons.values()),
        "rounds": [_summarize_round(found, result.rounds[0]) for found in result.rounds],
    }


def _summarize_round(found: Round, first: Round) -> dict[str, Any]:
    chosen = {(block, unit) for block, units in found.chosen.items() for unit in units}
    top = rank_neurons(found.scores)[: max(_TOP_SCORES, 2 * len(chosen))]
    normal = found.cosine[first.norms <= first.threshold]
    before, after = _outliers(found)
    return {
        "threshold": found.threshold,
        "images": len(found.norms),
        "images_with_outliers": found.counted,
        "outlier_patches_before": before,
        "outlier_patches_after": after,
        "of_these_in_the_first_patch": int((found.norms_after[:, 0] > found.threshold).sum()),
        "norm_quantiles_before": norm_quantiles(found.norms),
        "norm_quantiles_after": norm_quantiles(found.norms_after),
        "cosine_of_normal_patches": {
            "mean": float(normal.mean()),
            "quantile_0.01": float(np.quantile(normal, 0.01)),
            "least": float(normal.min()),
        },
        "neurons": {str(block): units for block, units in found.chosen.items()},
        "top_scores": [
            {
                "block": block,
                "unit": unit,
                "score": float(found.scores[block, unit]),
                "chosen": (block, unit) in chosen,
            }
            for block, unit in top
        ],
    }


def norm_quantiles(norms: np.ndarray) -> dict[str, float]:
    """Returns quantiles of token norms by name."""
    return {f"{q:g}": float(np.quantile(norms, q)) for q in QUANTILES}


def write_report(
    folder: Path,
    result: SearchResult,
    picture: Callable[[int], np.ndarray],
    details: Mapping[str, Any],
) -> None:
    """Writes `report.json`, `norms.png`, `maps.png`, `scores.png` and `report.html`.

    Args:
      folder: Output folder, created if missing.
      result: Result of the search.
      picture: Image by index, uint8 [H, W, 3].
      details: Further JSON values: encoder, images, settings, provenance.
    """
    summary = {**details, **summarize(result)}
    figures = {
        "norms.png": norm_figure(result),
        "maps.png": map_figure(result, picture),
        "scores.png": score_figure(result),
    }
    files = {}
    for name, figure in figures.items():
        encoded = io.BytesIO()
        figure.savefig(encoded, format="png", dpi=110)
        files[name] = encoded.getvalue()
        write_atomic(folder / name, files[name])
    write_json(folder / "report.json", summary)
    write_atomic(folder / "report.html", _page(summary, files))


def norm_figure(result: SearchResult) -> Figure:
    """Plots histograms of the patch norms before and after each round."""
    figure, axes = _figure(len(result.rounds), 1, 6.5, 3.0)
    for number, found in enumerate(result.rounds):
        axis = axes[number, 0]
        low = min(found.norms.min(), found.norms_after.min())
        high = max(found.norms.max(), found.norms_after.max())
        bins = np.geomspace(max(low, 1e-6), high * 1.001, 80)
        for norms, label in ((found.norms, "before"), (found.norms_after, "after")):
            axis.hist(norms.ravel(), bins, histtype="step", label=label)
        axis.axvline(found.threshold, color="black", linestyle="--", label="threshold")
        axis.set(xscale="log", yscale="log", xlabel="patch norm", ylabel="patches")
        axis.set_title(f"round {number + 1}")
        axis.legend()
    return figure


def map_figure(result: SearchResult, picture: Callable[[int], np.ndarray]) -> Figure:
    """Plots the images with the most outliers: image, norms before, norms after each round.

    All maps have the same color scale.
    """
    first = result.rounds[0]
    outliers = (first.norms > first.threshold).sum(axis=1)
    chosen = np.argsort(-outliers, kind="stable")[:_PICTURES]
    side = math.isqrt(first.norms.shape[1])
    columns = [("before", first.norms)]
    columns += [(f"after round {i + 1}", r.norms_after) for i, r in enumerate(result.rounds)]
    figure, axes = _figure(len(chosen), 1 + len(columns), 2.4, 2.2)
    scale = {"vmin": 0.0, "vmax": float(first.norms[chosen].max())}
    for row, index in enumerate(chosen.tolist()):
        axes[row, 0].imshow(picture(index))
        axes[row, 0].set_title(f"image {index}", fontsize=8)
        for axis, (label, norms) in zip(axes[row, 1:], columns, strict=True):
            shown = axis.imshow(norms[index].reshape(side, side), **scale)
            above = int((norms[index] > first.threshold).sum())
            axis.set_title(f"{label}: {above} outliers", fontsize=8)
        figure.colorbar(shown, ax=axes[row, 1:].tolist(), shrink=0.8)
        for axis in axes[row]:
            axis.set_axis_off()
    return figure


def score_figure(result: SearchResult) -> Figure:
    """Plots sorted scores with the chosen units marked, and the chosen units per block."""
    figure, axes = _figure(len(result.rounds), 2, 4.5, 3.0)
    for number, found in enumerate(result.rounds):
        ranked = rank_neurons(found.scores)
        chosen = {(block, unit) for block, units in found.chosen.items() for unit in units}
        shown = ranked[: max(_TOP_SCORES, 2 * len(chosen))]
        values = np.array([found.scores[pair] for pair in shown])
        marked = np.array([pair in chosen for pair in shown])
        ranks = np.arange(1, len(shown) + 1)
        curve, bars = axes[number]
        curve.plot(ranks, values, ".", color="gray", label="other")
        curve.plot(ranks[marked], values[marked], ".", color="red", label="chosen")
        curve.set(xscale="log", xlabel="rank", ylabel="mean |activation| on outliers")
        curve.set_title(f"round {number + 1}")
        curve.legend()
        depth = len(found.scores)
        bars.bar(range(depth), [len(found.chosen.get(block, [])) for block in range(depth)])
        bars.set(xlabel="block", ylabel="units chosen")
    return figure


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """Returns a figure without pyplot, whose global state would outlive the report."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _page(summary: Mapping[str, Any], figures: Mapping[str, bytes]) -> str:
    """Returns the HTML page with the numbers and the figures."""
    rows = []
    for number, found in enumerate(summary["rounds"]):
        units = ", ".join(f"block {b}: {u}" for b, u in found["neurons"].items())
        cells = [
            number + 1,
            f"{found['threshold']:.4g}",
            f"{found['images_with_outliers']} of {found['images']}",
            found["outlier_patches_before"],
            f"{found['outlier_patches_after']} ({found['of_these_in_the_first_patch']})",
            f"{found['cosine_of_normal_patches']['mean']:.4f}",
            units,
        ]
        rows.append([text(cell) for cell in cells])
    head = (
        "round",
        "threshold",
        "images with outliers",
        "outlier patches before",
        "after (in the first patch)",
        "cosine of normal patches",
        "units",
    )
    details = {key: summary[key] for key in summary if key not in ("rounds", "neurons")}
    captions = {
        "norms.png": ("Norms", "patch norms before and after each round"),
        "maps.png": ("Maps", "images with the most outliers: norms before and after each round"),
        "scores.png": ("Scores", "scores of the units, and the chosen ones by block"),
    }
    sections = [("Rounds", table(head, rows, "rounds"))]
    for name, encoded in figures.items():
        title, caption = captions[name]
        sections.append((title, picture(encoded, title, caption)))
    sections.append(
        ("Settings", f"<pre class='scroll'>{text(json.dumps(details, indent=2))}</pre>")
    )
    intro = f"<p>{summary['distinct_neurons']} units; {text(summary['ended'])}.</p>"
    return make_page("Register neurons", sections, intro=intro)
