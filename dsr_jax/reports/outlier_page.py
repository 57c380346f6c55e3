"""Report on the outlier tokens of up to six networks: maps, histograms, numbers, samples."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsr_jax.core.errors import ConfigError
from dsr_jax.reports.page import compare_pictures, figure, items, make_page, picture, text, to_json
from dsr_jax.reports.pictures import data_uri, encode_png

MAX_VARIANTS = 6

MAX_BYTES = 2**27
"""Size of all maps in a report, before they are encoded."""

MAPS: Mapping[str, str] = {
    "norms": "Norm",
    "pca": "Three principal components as RGB",
    "received": "Attention received",
    "strongest": "Attention of the strongest token",
    "registers": "Attention of the registers",
    "cosine": "Cosine to the neighbors",
}
"""Kinds of maps and their titles."""


@dataclass(frozen=True)
class Variant:
    """Measures of one network on the images and noise levels of a report.

    Attributes:
      name: Name in the report.
      grid: Patches from top to bottom and from left to right.
      maps: Numbers of the patch tokens by the names of `MAPS`, [N, L, B, T] for noise levels,
        blocks, images and tokens; "pca" is uint8 [N, L, B, T, 3]. "norms" is required.
      statistics: Statistics by block for each noise level, with "threshold".
      samples: Picture of samples, uint8 [H, W, C]; None if there are none.
      notes: Lines about its origin.
    """

    name: str
    grid: tuple[int, int]
    maps: Mapping[str, np.ndarray]
    statistics: Sequence[Mapping[str, np.ndarray]]
    samples: np.ndarray | None = None
    notes: Sequence[str] = ()


def make_outlier_page(
    title: str,
    variants: Sequence[Variant],
    times: Sequence[float | None],
    titles: Mapping[str, str],
    images: np.ndarray | None = None,
) -> str:
    """Returns the report.

    Args:
      title: Its title.
      variants: Networks, at most `MAX_VARIANTS`.
      times: Noise levels [N], 0 = data, 1 = noise; (None,) for encoders.
      titles: Names of the statistics, and what they are.
      images: Picture of the images that were measured, uint8 [H, W, C].

    Raises:
      ConfigError: If there are too many variants, or more numbers than a browser opens.
    """
    if not 0 < len(variants) <= MAX_VARIANTS:
        raise ConfigError(
            f"{len(variants)} networks to compare", f"give 1 to {MAX_VARIANTS} of them"
        )
    size = sum(_values(each).nbytes for variant in variants for each in variant.maps.values())
    if size > MAX_BYTES:
        raise ConfigError(
            f"the maps take {size >> 20} MiB, and a report at most {MAX_BYTES >> 20}",
            "measure fewer images, noise levels or networks",
        )
    data = {
        "times": list(times),
        "titles": {"threshold": "norm above which tokens are outliers", **titles},
        "variants": [_packed(variant) for variant in variants],
    }
    sections = [
        ("Maps", _controls(variants, times) + _canvases(variants, "map", "")),
        (
            "All blocks and noise levels",
            "<p>Blocks from left to right, noise levels from top (data) to bottom. Norms are "
            "relative to the median of their map: dark is a half, bright sixteen times.</p>"
            + _canvases(variants, "overview", "all blocks and noise levels"),
        ),
        (
            "Norms and the fitted threshold",
            "<p>Logarithmic counts of all images' tokens.</p>"
            + _canvases(variants, "histogram", "norms"),
        ),
        ("Numbers", _numbers(variants)),
        ("Samples from the same noise and labels", _gallery(variants)),
        ("What was measured", _notes(variants, images)),
    ]
    script = f'<script type="application/json" id="outlier-data">{to_json(data)}</script>'
    filled = [(name, content) for name, content in sections if content]
    return make_page(title, filled, scripts=("outliers.js",), intro=script)


def _packed(variant: Variant) -> dict[str, Any]:
    norms = variant.maps["norms"]
    samples = None if variant.samples is None else data_uri(encode_png(variant.samples))
    return {
        "name": variant.name,
        "grid": list(variant.grid),
        "blocks": norms.shape[1],
        "images": norms.shape[2],
        "samples": samples,
        "maps": {name: _encoded(values) for name, values in variant.maps.items()},
        "statistics": [
            {name: [_finite(x) for x in values] for name, values in statistics.items()}
            for statistics in variant.statistics
        ],
    }


def _encoded(values: np.ndarray) -> dict[str, str]:
    stored = _values(values)
    return {"kind": stored.dtype.name, "data": base64.b64encode(stored.tobytes()).decode("ascii")}


def _values(values: np.ndarray) -> np.ndarray:
    """Returns a map as it is stored: colors as bytes, numbers as little-endian float32."""
    return np.ascontiguousarray(values, "<u1" if values.dtype == np.uint8 else "<f4")


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _controls(variants: Sequence[Variant], times: Sequence[float | None]) -> str:
    blocks = max(variant.maps["norms"].shape[1] for variant in variants)
    images = min(variant.maps["norms"].shape[2] for variant in variants)
    here = [name for name in MAPS if any(name in variant.maps for variant in variants)]
    kinds = "".join(f'<option value="{name}">{text(MAPS[name])}</option>' for name in here)
    rows = "".join(f'<option value="{i}">{i}</option>' for i in range(images))
    return (
        '<div class="controls" id="map-controls">'
        f'<label>Map<select id="map-kind">{kinds}</select></label>'
        f'<label>Image<select id="map-image">{rows}</select></label>'
        f'<label><span>Block <output id="map-block-output"></output></span><input id="map-block" '
        f'type="range" min="0" max="{blocks - 1}" value="{blocks - 1}"></label>'
        f'<label><span>Noise level <output id="map-time-output"></output></span><input '
        f'id="map-time" type="range" min="0" max="{len(times) - 1}" value="0"></label>'
        '<label><span>Mark outliers</span><input id="map-marks" type="checkbox" checked></label>'
        "</div>"
    )


def _canvases(variants: Sequence[Variant], kind: str, caption: str) -> str:
    figures = (
        figure(
            f'<canvas role="img" aria-label="{kind} of {text(variant.name)}"></canvas>',
            f"{kind}-{index}",
            f"{variant.name}: {caption}",
        )
        for index, variant in enumerate(variants)
    )
    return f'<div class="grid">{"".join(figures)}</div>'


def _numbers(variants: Sequence[Variant]) -> str:
    heads = "".join(f'<th scope="col">{text(variant.name)}</th>' for variant in variants)
    return (
        "<p>For the chosen block and noise level.</p>"
        f'<div class="scroll"><table id="chosen"><thead><tr><th scope="col">statistic</th>{heads}'
        "</tr></thead><tbody></tbody></table></div>"
        '<div class="tools"><button type="button" id="save-numbers">Save CSV of all blocks and '
        "noise levels</button></div>"
    )


def _gallery(variants: Sequence[Variant]) -> str:
    sampled = [(i, variant) for i, variant in enumerate(variants) if variant.samples is not None]
    if len(sampled) < 2:
        return picture(sampled[0][1].samples, "samples", sampled[0][1].name) if sampled else ""
    choices = []
    for side, chosen in (("left", sampled[0][0]), ("right", sampled[-1][0])):
        options = "".join(
            f'<option value="{i}"{" selected" if i == chosen else ""}>{text(variant.name)}</option>'
            for i, variant in sampled
        )
        label = f"{side.capitalize()} picture"
        choices.append(f'<label>{label}<select id="gallery-{side}">{options}</select></label>')
    first, last = sampled[0][1], sampled[-1][1]
    slider = compare_pictures((first.name, first.samples), (last.name, last.samples), "gallery")
    return f'<div class="controls">{"".join(choices)}</div>{slider}'


def _notes(variants: Sequence[Variant], images: np.ndarray | None) -> str:
    parts = [f"<h3>{text(variant.name)}</h3>{items(variant.notes)}" for variant in variants]
    if images is not None:
        parts.append(picture(images, "images", "The images, in order"))
    return "".join(parts)
