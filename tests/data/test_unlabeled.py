"""Loose image files: any nesting, mode and shape; damaged ones are named."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsr_jax.core.errors import DataError, UnreadableRecord
from dsr_jax.data.unlabeled import UnlabeledImages


def _fill(folder: Path) -> None:
    """Left half dark, right half bright, in every mode that files come in."""
    pixels = np.full((20, 40, 3), 40, np.uint8)
    pixels[:, 20:] = 200
    image = Image.fromarray(pixels)
    (folder / "deep" / "er").mkdir(parents=True)
    image.save(folder / "color.png")
    image.convert("L").save(folder / "deep" / "gray.png")
    image.convert("RGBA").save(folder / "deep" / "alpha.png")
    image.convert("CMYK").save(folder / "deep" / "er" / "cmyk.jpg", quality=95)
    image.convert("P").save(folder / "palette.png")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")


def test_every_mode_becomes_the_same_whole_picture(tmp_path: Path) -> None:
    _fill(tmp_path)
    images = UnlabeledImages(str(tmp_path), 8)
    assert len(images) == 5
    for record in (images[i] for i in range(5)):
        image = record["image"]
        assert image.shape == (8, 8, 3) and image.dtype == np.uint8
        np.testing.assert_allclose(image[:, 0], 40, atol=6)
        np.testing.assert_allclose(image[:, -1], 200, atol=6)


def test_cropping_keeps_proportions(tmp_path: Path) -> None:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :4] = 255
    Image.fromarray(pixels).save(tmp_path / "left.png")
    assert UnlabeledImages(str(tmp_path), 8, fit="squash")[0]["image"].max() > 200
    for name in ("center_crop", "crop"):
        assert UnlabeledImages(str(tmp_path), 8, fit=name)[0]["image"].max() == 0
    with pytest.raises(DataError, match="'stretch'.*\n.*center_crop, squash"):
        UnlabeledImages(str(tmp_path), 8, fit="stretch")


def test_a_sample_is_fixed_by_its_seed(tmp_path: Path) -> None:
    _fill(tmp_path)

    def chosen(seed: int) -> set[Path]:
        images = UnlabeledImages(str(tmp_path), 8, count=2, seed=seed)
        return {images.path(0), images.path(1)}

    assert chosen(3) == chosen(3)
    assert len(set().union(*map(chosen, range(8)))) > 2


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    _fill(tmp_path)
    path = tmp_path / "deep" / "er" / "cmyk.jpg"
    path.write_bytes(path.read_bytes()[:200])
    images = UnlabeledImages(str(tmp_path), 8)
    index = next(i for i in range(5) if images.path(i) == path)
    with pytest.raises(UnreadableRecord, match="cmyk.jpg"):
        images[index]


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images"):
        UnlabeledImages(str(tmp_path), 8)
    with pytest.raises(DataError, match="does not exist"):
        UnlabeledImages(str(tmp_path / "none"), 8)


def test_files_that_cannot_be_decoded_are_left_out_on_request(tmp_path: Path) -> None:
    _fill(tmp_path)
    (tmp_path / "cut.png").write_bytes((tmp_path / "color.png").read_bytes()[:60])
    images = UnlabeledImages(str(tmp_path), 8, on_corrupt="skip")
    assert len(images) == 5 and images.skipped == [tmp_path / "cut.png"]
    (tmp_path / "only").mkdir()
    (tmp_path / "cut.png").rename(tmp_path / "only" / "cut.png")
    with pytest.raises(DataError, match="can be decoded"):
        UnlabeledImages(str(tmp_path / "only"), 8, on_corrupt="skip")
