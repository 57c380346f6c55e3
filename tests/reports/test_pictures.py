"""Colors, panels and files of pictures."""

import base64
import io

import numpy as np
from PIL import Image

from dsr_jax.reports.pictures import colorize, data_uri, encode_png, heat_map, tile


def test_colors_rise_with_the_numbers() -> None:
    colors = colorize(np.linspace(0, 1, 9)).astype(int)
    assert tuple(colors[0]) == (68, 1, 84) and tuple(colors[-1]) == (253, 231, 37)
    luminance = colors @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > 0).all()


def test_missing_numbers_are_gray_and_constant_ones_dark() -> None:
    assert tuple(colorize(np.array([0.0, np.nan, 1.0]))[1]) == (128, 128, 128)
    assert (colorize(np.ones((2, 2))) == [68, 1, 84]).all()
    assert (colorize(np.full(3, np.nan)) == 128).all()


def test_limits_clip() -> None:
    assert (colorize(np.array([-5.0, 9.0]), 0, 1) == colorize(np.array([0.0, 1.0]))).all()


def test_a_panel_shows_its_cells_from_the_bottom() -> None:
    values = np.array([[0.0, 0.0, 1.0], [0.5, 0.5, 0.5]])
    panel = heat_map(values, "title", ("block", ["0", "1"]), ("step", ["1", "2", "3"]), 30, 20)
    assert panel.shape == (80, 170, 3)
    bottom_right = panel[22 + 19, 58 + 29]
    assert tuple(bottom_right) == tuple(colorize(np.array([0.0, 1.0]))[1])
    assert tuple(panel[22 + 19, 58]) == (68, 1, 84)


def test_panels_are_tiled_on_white() -> None:
    panels = [np.full((2, 3, 3), i, np.uint8) for i in range(3)]
    canvas = tile(panels)
    assert canvas.shape == (4, 6, 3)
    assert (canvas[2:, :3] == 2).all() and (canvas[2:, 3:] == 255).all()


def test_files_hold_the_pixels() -> None:
    image = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    uri = data_uri(encode_png(image))
    head, _, body = uri.partition(",")
    assert head == "data:image/png;base64"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(body)))), image)
    gray = Image.open(io.BytesIO(encode_png(image[..., :1])))
    np.testing.assert_array_equal(np.asarray(gray), image[..., 0])
