"""Loose image files: any nesting, mode and shape; damaged ones are named."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsr_jax.core.errors import DataError
from dsr_jax.data.base import UnreadableRecord
from dsr_jax.data.photos import Photos


def _fill(folder: Path) -> None:
    """Left half dark, right half bright, in every mode that files come in."""
    pixels = np.full((20, 40, 3), 40, np.uint8)
    pixels[:, 20:] = 200
    image = Image.fromarray(pixels)
    (folder / "deep" / "er").mkdir(parents=True)
    image.save(folder / "colour.png")
    image.convert("L").save(folder / "deep" / "grey.png")
    image.convert("RGBA").save(folder / "deep" / "alpha.png")
    image.convert("CMYK").save(folder / "deep" / "er" / "cmyk.jpg", quality=95)
    image.convert("P").save(folder / "palette.png")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")


def test_every_mode_becomes_the_same_whole_picture(tmp_path: Path) -> None:
    _fill(tmp_path)
    photos = Photos(str(tmp_path), 8)
    assert len(photos) == 5
    for record in (photos[i] for i in range(5)):
        image = record["image"]
        assert image.shape == (8, 8, 3) and image.dtype == np.uint8
        np.testing.assert_allclose(image[:, 0], 40, atol=6)
        np.testing.assert_allclose(image[:, -1], 200, atol=6)


def test_cropping_keeps_proportions(tmp_path: Path) -> None:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :4] = 255
    Image.fromarray(pixels).save(tmp_path / "left.png")
    assert Photos(str(tmp_path), 8, fit="squash")[0]["image"].max() > 200
    assert Photos(str(tmp_path), 8, fit="crop")[0]["image"].max() == 0


def test_a_sample_is_fixed_by_its_seed(tmp_path: Path) -> None:
    _fill(tmp_path)
    drawn = [{Photos(str(tmp_path), 8, count=2, seed=s).path(i) for i in (0, 1)} for s in range(8)]
    again = Photos(str(tmp_path), 8, count=2, seed=3)
    assert drawn[3] == {again.path(0), again.path(1)}
    assert len(set().union(*drawn)) > 2


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    _fill(tmp_path)
    path = tmp_path / "deep" / "er" / "cmyk.jpg"
    path.write_bytes(path.read_bytes()[:200])
    photos = Photos(str(tmp_path), 8)
    index = next(i for i in range(5) if photos.path(i) == path)
    with pytest.raises(UnreadableRecord, match="cmyk.jpg"):
        photos[index]


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images"):
        Photos(str(tmp_path), 8)
    with pytest.raises(DataError, match="does not exist"):
        Photos(str(tmp_path / "none"), 8)


def test_files_that_cannot_be_decoded_are_left_out_on_request(tmp_path: Path) -> None:
    _fill(tmp_path)
    (tmp_path / "cut.png").write_bytes((tmp_path / "colour.png").read_bytes()[:60])
    photos = Photos(str(tmp_path), 8, on_corrupt="skip")
    assert len(photos) == 5 and photos.skipped == [tmp_path / "cut.png"]
    (tmp_path / "only").mkdir()
    (tmp_path / "cut.png").rename(tmp_path / "only" / "cut.png")
    with pytest.raises(DataError, match="can be decoded"):
        Photos(str(tmp_path / "only"), 8, on_corrupt="skip")
