"""The HTML template of all pages: one self-contained file, light and dark, for screens and phones.

A page makes no request: styles, script, pictures and numbers are in it, and a content security
policy forbids anything else. Figures can be saved as PNG, numbers as CSV.
"""

from __future__ import annotations

import html
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsr_jax.reports.pictures import data_uri, encode_png

COLORS = ("#4269d0", "#efb118", "#6cc5b0", "#ff725c", "#a463f2", "#9c6b4e", "#97bbf5", "#3ca951")
"""Colors of series, in order; they tell apart on light and on dark ground."""

_FOLDER = Path(__file__).parent
_POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)


def make_page(
    title: str, sections: Iterable[tuple[str, str]], scripts: Sequence[str] = (), intro: str = ""
) -> str:
    """Returns a page.

    Args:
      title: Its title, plain text.
      sections: Titles, plain text, and contents, HTML.
      scripts: Names of further scripts of this package.
      intro: HTML above the sections.
    """
    parts = [(f"section-{slug(name)}", name, content) for name, content in sections]
    links = "".join(f'<li><a href="#{key}">{text(name)}</a></li>' for key, name, _ in parts)
    body = "".join(
        f'<section id="{key}"><h2>{text(name)}</h2>{content}</section>'
        for key, name, content in parts
    )
    code = "\n".join((_FOLDER / name).read_text() for name in ("page.js", *scripts))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{(_FOLDER / 'page.css').read_text()}</style></head>"
        f'<body><a class="skip" href="#content">Skip to the content</a><header>'
        f'<h1>{text(title)}</h1><button id="theme" type="button">Light or dark</button></header>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>'
        f'<main id="content">{intro}{body}</main><script>{code}</script></body></html>\n'
    )


def text(value: object) -> str:
    """Returns a value as escaped text; characters that have no UTF-8 become "?"."""
    return html.escape(str(value).encode("utf-8", "replace").decode())


def slug(name: str) -> str:
    """Returns a name as an identifier of the page and of files that it saves."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "section"


def key(index: int) -> str:
    """Returns a square in the color of series `index`."""
    return f'<span class="key" style="background:{COLORS[index % len(COLORS)]}"></span>'


def bar(sizes: Mapping[str, float], whole: float | None = None) -> str:
    """Returns a bar that is divided in proportion to sizes.

    Args:
      sizes: Sizes by name.
      whole: Size of the whole bar; None for their sum.
    """
    whole = whole or sum(sizes.values()) or 1
    cells = (
        f'<div style="width:{100 * size / whole:.2f}%;background:{COLORS[i % len(COLORS)]}" '
        f'title="{text(name)}"></div>'
        for i, (name, size) in enumerate(sizes.items())
    )
    return f'<div class="bar">{"".join(cells)}</div>'


def table(heads: Iterable[str], rows: Iterable[Iterable[str]], name: str = "table") -> str:
    """Returns a table that can be saved as CSV.

    Args:
      heads: HTML of the column heads.
      rows: HTML of the cells.
      name: Name of the CSV file.
    """
    lines = ["".join(f'<th scope="col">{head}</th>' for head in heads)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    content = f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
    return f'<figure id="{slug(name)}"><div class="scroll">{content}</div>{_tools("csv")}</figure>'


def items(lines: Iterable[str]) -> str:
    """Returns a list of plain texts."""
    return f"<ul>{''.join(f'<li>{text(line)}</li>' for line in lines)}</ul>"


def picture(image: Any, name: str, caption: str, numbers: Sequence[Sequence[Any]] = ()) -> str:
    """Returns a figure of a picture.

    Args:
      image: Pixels, uint8 [H, W, C], or the bytes of a PNG file.
      name: Name of the files that it can be saved as.
      caption: Plain text, also the alternative text.
      numbers: Rows of the CSV file; none if empty.
    """
    return figure(f'<img src="{_source(image)}" alt="{text(caption)}">', name, caption, numbers)


def figure(content: str, name: str, caption: str, numbers: Sequence[Sequence[Any]] = ()) -> str:
    """Returns a figure of any content: an image, canvas or svg."""
    kinds = ("png", "csv") if numbers else ("png",)
    data = f'<script type="application/json">{to_json(numbers)}</script>' if numbers else ""
    return (
        f'<figure id="{slug(name)}"><div class="scroll">{content}</div>'
        f"<figcaption>{text(caption)}</figcaption>{_tools(*kinds)}{data}</figure>"
    )


def step_pictures(images: Sequence[tuple[str, Any]], name: str, caption: str) -> str:
    """Returns a figure that shows one of several pictures at a time, chosen by a slider.

    Args:
      images: Name and picture of each; the last one is shown first.
      name: Name of the figure.
      caption: Plain text.
    """
    shown = "".join(
        f'<img src="{_source(image)}" alt="{text(alt)}"{"" if i == len(images) - 1 else " hidden"}>'
        for i, (alt, image) in enumerate(images)
    )
    last = len(images) - 1
    return (
        f'<figure id="{slug(name)}"><div class="scroll">{shown}</div><figcaption>{text(caption)}: '
        f"<output>{text(images[-1][0])}</output></figcaption>"
        f'<label>Choose<input type="range" data-steps min="0" max="{last}" value="{last}"></label>'
        "</figure>"
    )


def compare_pictures(first: tuple[str, Any], second: tuple[str, Any], name: str) -> str:
    """Returns a figure in which a slider uncovers one of two pictures of the same size.

    Args:
      first: Name and picture on the left.
      second: Name and picture on the right.
      name: Name of the figure.
    """
    images = "".join(
        f'<img src="{_source(image)}" alt="{text(alt)}">' for alt, image in (first, second)
    )
    return (
        f'<figure id="{slug(name)}"><div class="compare">{images}</div>'
        f"<label><span>{text(first[0])} (left) and {text(second[0])} (right)</span>"
        '<input type="range" data-compare min="0" max="100" value="50"></label></figure>'
    )


def line_chart(
    name: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    axes: tuple[str, str] = ("step", ""),
    size: tuple[int, int] = (480, 260),
) -> str:
    """Returns a figure of curves, with a legend.

    Args:
      name: Title.
      series: Points (x, y) by name; points must be finite.
      axes: Names of the horizontal and the vertical axis.
      size: Width and height in pixels.
    """
    points = [point for curve in series.values() for point in curve]
    if not points:
        return ""
    width, height = size
    left, top, right, bottom = 56, 24, 12, 34
    (x_low, x_high), (y_low, y_high) = (_limits(axis) for axis in zip(*points, strict=True))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (width - left - right)
        return left + across, top + (y_high - y) / (y_high - y_low) * (height - top - bottom)

    parts = [f'<text x="{left}" y="14" font-weight="bold">{text(name)}</text>']
    for fraction in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = y_low + fraction * (y_high - y_low)
        _, y = place(x_low, value)
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" '
            'stroke="currentColor" stroke-opacity=".2"/>'
            f'<text x="{left - 4}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        )
        value = x_low + fraction * (x_high - x_low)
        x, _ = place(value, y_low)
        parts.append(
            f'<text x="{x:.1f}" y="{height - bottom + 15}" text-anchor="middle">{value:,.4g}</text>'
        )
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 4}" text-anchor="middle">'
        f"{text(axes[0])}</text>"
    )
    for index, curve in enumerate(series.values()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in itertools.starmap(place, curve))
        color = COLORS[index % len(COLORS)]
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        if len(curve) == 1:
            x, y = place(*curve[0])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>')
    label = f"{name} over {axes[0]}: {', '.join(series)}"
    drawing = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{text(label)}" width="{width}" font-family="sans-serif" font-size="11" '
        f'fill="currentColor">{"".join(parts)}</svg>'
    )
    legend = " ".join(f"<span>{key(i)}{text(each)}</span>" for i, each in enumerate(series))
    numbers = [[axes[0], "series", axes[1] or name]]
    numbers += [[x, each, y] for each, curve in series.items() for x, y in curve]  # type: ignore[list-item]
    data = f'<script type="application/json">{to_json(numbers)}</script>'
    return (
        f'<figure id="{slug(name)}">{drawing}<figcaption>{legend}</figcaption>'
        f"{_tools('png', 'csv')}{data}</figure>"
    )


def to_json(value: object) -> str:
    """Returns JSON that can stand in a script element."""
    # Any "<": besides the end of a script, "<!--" changes how the browser reads on.
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = abs(low) / 2 or 0.5
    return (low, high) if high > low else (low - margin, high + margin)


def _source(image: Any) -> str:
    return data_uri(image if isinstance(image, bytes) else encode_png(image))


def _tools(*kinds: str) -> str:
    buttons = "".join(
        f'<button type="button" data-save="{kind}">Save {kind.upper()}</button>' for kind in kinds
    )
    return f'<div class="tools">{buttons}</div>'
