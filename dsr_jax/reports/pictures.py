"""Heat maps as pixels: a color scale, panels with axes, PNG."""

import base64
import io
import math
from collections.abc import Sequence

import numpy as np

# Every sixteenth color of matplotlib's viridis.
_VIRIDIS = np.array(
    [
        *((68, 1, 84), (72, 26, 108), (71, 47, 125), (65, 68, 135), (57, 86, 140), (49, 104, 142)),
        *((42, 120, 142), (35, 136, 142), (31, 152, 139), (34, 168, 132), (53, 183, 121)),
        *((84, 197, 104), (122, 209, 81), (165, 219, 54), (210, 226, 27), (236, 229, 27)),
        (253, 231, 37),
    ],
    np.float64,
)
_MISSING = 128
_BLACK = (0, 0, 0)
_BAR = 10


def colorize(values: np.ndarray, low: float | None = None, high: float | None = None) -> np.ndarray:
    """Maps numbers [...] to colors [..., 3], uint8, on the scale of viridis; NaN becomes gray.

    Args:
      values: Numbers of any shape.
      low: Number of the darkest color; None for the smallest one.
      high: Number of the brightest color; None for the largest one.
    """
    values = np.asarray(values, np.float64)
    finite = values[np.isfinite(values)]
    low = float(finite.min(initial=np.inf)) if low is None else low
    high = float(finite.max(initial=-np.inf)) if high is None else high
    span = high - low if high > low else 1.0
    fractions = np.clip(np.nan_to_num((values - low) / span, nan=0.0), 0, 1)
    places = np.linspace(0, 1, len(_VIRIDIS))
    colors = np.stack([np.interp(fractions, places, channel) for channel in _VIRIDIS.T], axis=-1)
    colors[np.isnan(values)] = _MISSING
    return np.round(colors).astype(np.uint8)


def encode_png(image: np.ndarray) -> bytes:
    """Returns a picture, uint8 [H, W, 3] or gray [H, W, 1], as a PNG file."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(out, format="PNG")
    return out.getvalue()


def data_uri(image: bytes, kind: str = "image/png") -> str:
    """Returns a file's bytes as the address that a page embeds."""
    return f"data:{kind};base64,{base64.b64encode(image).decode('ascii')}"


def heat_map(
    values: np.ndarray,
    title: str,
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
    width: int = 360,
    height: int = 200,
) -> np.ndarray:
    """Returns a panel with axes, a title and a scale, uint8 [height + 60, width + 140, 3].

    Args:
      values: Numbers [R, C], the first row at the bottom; NaN is gray.
      title: Title of the panel.
      rows: Name of the vertical axis, and a name for each row.
      columns: Name of the horizontal axis, and a name for each column.
      width: Pixels of the cells from left to right.
      height: Pixels of the cells from top to bottom.
    """
    from PIL import Image, ImageDraw, ImageFont

    values = np.asarray(values, np.float64)
    left, top, right, bottom = 58, 22, 82, 38
    canvas = np.full((top + height + bottom, left + width + right, 3), 255, np.uint8)
    y = (np.arange(height)[::-1] * values.shape[0]) // height
    x = (np.arange(width) * values.shape[1]) // width
    canvas[top : top + height, left : left + width] = colorize(values)[y][:, x]
    start = left + width + 10
    ramp = colorize(np.linspace(1, 0, height)[:, None])
    canvas[top : top + height, start : start + _BAR] = ramp
    image = Image.fromarray(canvas)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(11)

    def text(at: tuple[float, float], content: str, anchor: str) -> None:
        draw.text(at, content, fill=_BLACK, font=font, anchor=anchor)

    text((left, top / 2), title, "lm")
    for index in _ticks(len(rows[1]), height / 14):
        text((left - 5, top + height * (1 - (index + 0.5) / len(rows[1]))), rows[1][index], "rm")
    longest = max(font.getlength(name) for name in columns[1]) + 8
    for index in _ticks(len(columns[1]), width / longest):
        at = left + width * (index + 0.5) / len(columns[1])
        text((at, top + height + 10), columns[1][index], "mm")
    text((left + width / 2, top + height + 27), columns[0], "mm")
    text((4, top + height + 10), rows[0], "lm")
    finite = values[np.isfinite(values)]
    if finite.size:
        text((start + _BAR + 4, top + 5), f"{finite.max():.3g}", "lm")
        text((start + _BAR + 4, top + height - 5), f"{finite.min():.3g}", "lm")
    return np.asarray(image)


def tile(panels: Sequence[np.ndarray], columns: int = 2) -> np.ndarray:
    """Lays panels of one size out row by row on a white canvas."""
    count = math.ceil(len(panels) / columns) * columns
    blank = np.full_like(panels[0], 255)
    filled = [*panels, *[blank] * (count - len(panels))]
    lines = [np.concatenate(filled[i : i + columns], axis=1) for i in range(0, count, columns)]
    return np.concatenate(lines, axis=0)


def _ticks(count: int, most: float) -> range:
    """Returns the indices that are named, at most about `most` of them."""
    return range(0, count, max(1, math.ceil(count / max(most, 1))))
