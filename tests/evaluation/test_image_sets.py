"""Files, folders and sources give the same images in the same order."""

import numpy as np
import pytest
from PIL import Image

from dsr_jax.core.errors import EvaluationError
from dsr_jax.data.sources import make_source
from dsr_jax.evaluation.image_sets import ImageFiles, SourceImages, open_images

IMAGES = np.random.RandomState(0).randint(0, 256, (11, 4, 5, 3)).astype(np.uint8)


def write_pngs(folder, images=IMAGES, suffix="png"):
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:06d}.{suffix}")
    return folder


@pytest.fixture(params=["npz", "compressed", "png"])
def images(request, tmp_path):
    """The same images as each kind of set."""
    if request.param == "png":
        return open_images(write_pngs(tmp_path / "images"))
    save = np.savez if request.param == "npz" else np.savez_compressed
    save(tmp_path / "images.npz", IMAGES)
    return open_images(tmp_path / "images.npz")


def test_batches_from_anywhere(images):
    assert images.shape == IMAGES.shape
    np.testing.assert_array_equal(np.concatenate(list(images.batches(4))), IMAGES)
    np.testing.assert_array_equal(np.concatenate(list(images.batches(4, start=8))), IMAGES[8:])


def test_the_wanted_rows_of_each_batch(images):
    """As a process holds them whose devices alternate with those of another."""
    found = list(images.batches(4, rows=np.array([0, 3])))
    assert len(IMAGES) == 11 and [len(rows) for rows in found] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(found), IMAGES[[0, 3, 4, 7, 8]])
    (last,) = images.batches(4, start=8, rows=np.array([3]))
    assert last.shape == (0, *IMAGES.shape[1:])


def test_digests_distinguish_contents_and_names(tmp_path):
    digest = ImageFiles(write_pngs(tmp_path / "a")).digest()
    assert ImageFiles(write_pngs(tmp_path / "b")).describe()["digest"] == digest
    changed = IMAGES.copy()
    changed[3, 0, 0, 0] ^= 1
    assert ImageFiles(write_pngs(tmp_path / "c", changed)).digest() != digest
    assert ImageFiles(write_pngs(tmp_path / "d", suffix="jpg")).describe()["lossy"] == [".jpg"]


def test_folders_that_cannot_be_scored(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="no image files"):
        open_images(tmp_path / "empty")
    folder = write_pngs(tmp_path / "mixed")
    Image.fromarray(IMAGES[0, :2]).save(folder / "000005.png")
    with pytest.raises(EvaluationError, match=r"000005.png has \(2, 5\) pixels"):
        list(open_images(folder).batches(4))
    (folder / "000002.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(EvaluationError, match="000002.png cannot be decoded"):
        list(open_images(folder).batches(4))


def test_folders_are_decoded_as_in_training(tmp_path):
    (tmp_path / "a").mkdir()
    gray = np.tile(np.arange(64, dtype=np.uint16) * 4, (64, 1)) * 257
    palette = Image.fromarray(gray.astype(np.uint8)).convert("RGB").quantize(16)
    Image.fromarray(gray).save(tmp_path / "a" / "0.png")
    Image.fromarray(gray >> 8).convert("1").save(tmp_path / "a" / "1.png")
    palette.save(tmp_path / "a" / "2.png", transparency=bytes(range(16)))
    palette.convert("CMYK").save(tmp_path / "a" / "3.tif")
    scored = next(open_images(tmp_path / "a").batches(4))
    source = make_source("folder", image_size=64, channels=3, root=str(tmp_path))
    np.testing.assert_array_equal(scored, [source[i]["image"] for i in range(4)])
    np.testing.assert_array_equal(scored[0, ..., 0], gray >> 8)


def test_subfolders_are_part_of_the_set(tmp_path):
    for name in ("b", "a"):
        write_pngs(tmp_path / name)
    images = open_images(tmp_path)
    assert images.shape == (22, 4, 5, 3)
    np.testing.assert_array_equal(next(images.batches(22)), np.concatenate([IMAGES, IMAGES]))
    Image.fromarray(IMAGES[0]).save(tmp_path / "grid.png")
    with pytest.raises(
        EvaluationError, match=r"holds 1 images \(grid.png, ...\) beside .* with 22"
    ):
        open_images(tmp_path)


def test_sources_are_taken_whole_or_at_even_intervals():
    source = make_source("synthetic", image_size=8, channels=3)
    some = SourceImages(source, 5)
    step = len(source) // 5
    want = np.stack([source[i * step]["image"] for i in range(5)])
    np.testing.assert_array_equal(next(some.batches(5)), want)
    assert SourceImages(source).shape == (len(source), 8, 8, 3)
    assert some.describe()["of"] == len(source)
    with pytest.raises(EvaluationError, match="are asked for"):
        SourceImages(source, len(source) + 1)
