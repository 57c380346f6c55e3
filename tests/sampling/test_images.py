"""Floats to uint8, grids and PNG files."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError
from dsr_jax.sampling.images import UINT8_MODES, image_grid, name_rows, save_png_grid, to_uint8


def test_uint8_modes_differ_as_the_official_codes_do():
    levels = jnp.array([-0.5, 0.0, 0.999 / 255, 1.4 / 255, 1.5 / 255, 2.6 / 255, 1.0, 7.0])
    assert to_uint8(levels, "truncate").tolist() == [0, 0, 0, 1, 1, 2, 255, 255]
    assert to_uint8(levels, "round").tolist() == [0, 0, 1, 1, 2, 3, 255, 255]
    assert to_uint8(levels, "sit").tolist() == [0, 0, 1, 1, 2, 3, 255, 255]


@pytest.mark.parametrize("mode", UINT8_MODES)
def test_uint8_levels_survive_the_round_trip(mode):
    levels = np.arange(256, dtype=np.float32)
    # Half a level up, so that truncation keeps the level despite the rounding of the division.
    offset = 0.5 if mode == "truncate" else 0.0
    assert (np.asarray(to_uint8((levels + offset) / 255, mode)) == levels).all()


def test_bfloat16_images_are_scaled_in_float32():
    assert to_uint8(jnp.asarray(0.5, jnp.bfloat16)).tolist() == 127


def test_unknown_uint8_mode():
    with pytest.raises(ConfigError, match="'floor'"):
        to_uint8(jnp.zeros(1), "floor")


def test_grid_places_images_row_by_row():
    images = np.arange(1, 6, dtype=np.uint8).reshape(5, 1, 1, 1).repeat(2, axis=1)
    grid = image_grid(images, columns=3, gap=1)
    assert grid[..., 0].tolist() == [
        [1, 0, 2, 0, 3],
        [1, 0, 2, 0, 3],
        [0, 0, 0, 0, 0],
        [4, 0, 5, 0, 0],
        [4, 0, 5, 0, 0],
    ]
    assert image_grid(images).shape == (4, 3, 1)
    with pytest.raises(ValueError, match="at least one"):
        image_grid(images[:0])


def test_png_grid_enlarges_small_images_by_nearest_neighbor(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.RandomState(0).randint(0, 256, (3, 8, 8, 1)).astype(np.uint8)
    save_png_grid(tmp_path / "grid.png", pixels, columns=3)
    grid = np.asarray(image.open(tmp_path / "grid.png"))
    assert grid.shape == (32, 3 * 34 - 2, 3)
    np.testing.assert_array_equal(grid[2::4, 2:32:4, 1], pixels[0, ..., 0])
    np.testing.assert_array_equal(grid[2::4, 36:66:4, 1], pixels[1, ..., 0])


def test_png_grid_writes_class_numbers_above_the_images(tmp_path):
    image = pytest.importorskip("PIL.Image")
    black = np.zeros((2, 32, 32, 3), np.uint8)
    save_png_grid(tmp_path / "grid.png", black, labels=np.array([3, 8]), columns=2)
    grid = np.asarray(image.open(tmp_path / "grid.png"))
    first, second = grid[:12, :32], grid[:12, 34:]
    assert first.any() and second.any() and (first != second).any()
    assert not grid[12:].any()


def test_names_stand_left_of_their_rows():
    canvas = np.zeros((40, 30, 3), np.uint8)
    named = name_rows(canvas, ["above", "a longer name"])
    margin = named[:, :-30]
    assert named.shape[0] == 40 and (named[:, -30:] == 0).all()
    widths = [np.ptp(np.flatnonzero(half.any(axis=(0, 2)))) for half in (margin[:20], margin[20:])]
    assert 0 < widths[0] < widths[1]
