"""Toy data sets, image folders, and what happens when files are missing or damaged."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsr_jax.core.errors import ConfigError, DataError, UnreadableRecord
from dsr_jax.data import classes
from dsr_jax.data.base import Record, SourceOptions
from dsr_jax.data.folder import ImageFolder
from dsr_jax.data.pipeline import iterate_once, make_batches
from dsr_jax.data.sources import SkipUnreadable, make_source


def make_folder(root: Path, counts: dict[str, int]) -> Path:
    """Writes plain images whose gray level is their number in sorted order times four."""
    level = 0
    for name in sorted(counts):
        (root / name).mkdir(parents=True)
        for number in range(counts[name]):
            gray = np.full((8, 8, 3), level * 4, np.uint8)
            Image.fromarray(gray).save(root / name / f"{number:03d}.png")
            level += 1
    return root


def test_digits_are_the_scans() -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    source = make_source("digits", split="all", image_size=8, channels=1)
    assert len(source) == len(images) == 1797 and source.num_classes == 10
    record = source[41]
    assert record["image"].dtype == np.uint8 and record["image"].shape == source.image_shape
    np.testing.assert_array_equal(record["image"].reshape(-1), np.round(images[41] * 255 / 16))
    assert record["label"] == labels[41] and record["label"].dtype == np.int32


def test_every_fifth_digit_is_held_out() -> None:
    whole, train, heldout = (
        make_source("digits", split=split, image_size=8, channels=1)
        for split in ("all", "train", "heldout")
    )
    assert len(train) + len(heldout) == len(whole)
    np.testing.assert_array_equal(heldout[3]["image"], whole[15]["image"])
    np.testing.assert_array_equal(train[4]["image"], whole[6]["image"])


def test_images_keep_their_proportions_where_squares_are_cut_later(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.fromarray(np.zeros((30, 45, 3), np.uint8)).save(tmp_path / "cat" / "wide.png")
    source = make_source(
        "folder", root=str(tmp_path), image_size=20, channels=3, fit="resize_shorter_side"
    )
    assert source[0]["image"].shape == (20, 30, 3)
    square = make_source("folder", root=str(tmp_path), image_size=20, channels=3)
    assert square[0]["image"].shape == square.image_shape == (20, 20, 3)


def test_digits_grow_by_repeating_pixels() -> None:
    small = make_source("digits", image_size=8, channels=1)[7]["image"]
    large = make_source("digits", image_size=24, channels=3)[7]["image"]
    assert large.shape == (24, 24, 3)
    np.testing.assert_array_equal(large[1::3, 2::3, 1:2], small)
    with pytest.raises(DataError, match="multiple of 8"):
        make_source("digits", image_size=12, channels=1)


def test_shapes_are_fixed_by_their_index() -> None:
    source, again = (
        make_source("synthetic", image_size=20, channels=3, num_classes=7) for _ in range(2)
    )
    records = [source[i] for i in range(200)]
    assert {int(r["label"]) for r in records} == set(range(7))
    assert records[5]["image"].shape == (20, 20, 3) and records[5]["image"].dtype == np.uint8
    np.testing.assert_array_equal(records[5]["image"], again[5]["image"])
    assert len({r["image"].tobytes() for r in records}) == 200
    heldout = make_source("synthetic", split="heldout", image_size=20, channels=3, num_classes=7)
    train = {r["image"].tobytes() for r in records}
    assert not any(heldout[i]["image"].tobytes() in train for i in range(50))


def test_the_class_shows_in_a_shape() -> None:
    """Mean colors of two classes differ by more than their samples scatter."""
    source = make_source("synthetic", image_size=16, channels=5, num_classes=2)
    means: dict[int, list[np.ndarray]] = {0: [], 1: []}
    for i in range(100):
        means[int(source[i]["label"])].append(source[i]["image"].mean((0, 1)))
    zero, one = (np.stack(means[label]) for label in (0, 1))
    gap = np.abs(zero.mean(0) - one.mean(0)) / (zero.std(0) + one.std(0))
    assert gap.max() > 0.5


def test_labels_are_class_folders_in_sorted_order(tmp_path: Path) -> None:
    source = ImageFolder(SourceOptions(8, root=str(make_folder(tmp_path, {"zebra": 2, "ant": 3}))))
    (tmp_path / ".cache").mkdir()
    assert source.class_names == ["ant", "zebra"] and source.num_classes == 2
    assert [int(source[i]["label"]) for i in range(5)] == [0, 0, 0, 1, 1]
    assert [int(source[i]["image"][0, 0, 0]) for i in range(5)] == [0, 4, 8, 12, 16]


def test_folder_of_splits(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", {"a": 2, "b": 1})
    make_folder(tmp_path / "val", {"a": 1, "b": 1})
    options = {"root": str(tmp_path), "image_size": 8, "channels": 3}
    assert len(make_source("folder", split="train", **options)) == 3
    assert len(make_source("folder", split="val", **options)) == 2
    with pytest.raises(DataError, match="look like splits.*train, val"):
        make_source("folder", split="heldout", **options)


def test_wrong_roots_are_named_with_a_remedy(tmp_path: Path) -> None:
    def error(root: Path | None) -> str:
        with pytest.raises(DataError) as info:
            make_source("folder", root=root and str(root), image_size=8, channels=3)
        return str(info.value)

    (tmp_path / "imagenet").mkdir()
    assert "config.data.root" in error(None)
    assert "imagnet/train' does not exist" in (text := error(tmp_path / "imagnet" / "train"))
    assert "holds: imagenet" in text
    assert "imagenet is empty" in error(tmp_path / "imagenet")
    (tmp_path / "imagenet" / "1.JPEG").touch()
    assert "holds 1 images, no class folders" in error(tmp_path / "imagenet")
    assert "is a file" in error(tmp_path / "imagenet" / "1.JPEG")
    (tmp_path / "imagenet" / "cat").mkdir()
    assert "imagenet/cat holds no images" in error(tmp_path / "imagenet")


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(DataError, match="'digit'.*\n.*digits, synthetic, folder"):
        make_source("digit", image_size=8, channels=1)
    with pytest.raises(DataError, match="no split 'val'.*\n.*heldout"):
        make_source("digits", split="val", image_size=8, channels=1)
    with pytest.raises(DataError, match="10 classes.*label table 4.*\n.*num_classes=10"):
        make_source("digits", image_size=8, channels=1, num_classes=4)
    with pytest.raises(DataError, match="on_corrupt='ignore'"):
        make_source("digits", image_size=8, channels=1, on_corrupt="ignore")
    with pytest.raises(DataError, match="2 channels"):
        make_source("digits", image_size=8, channels=2)


class Stripes:
    """A source outside the package; its last record has no label."""

    name, num_classes, class_names = "stripes", 2, ("thin", "wide")

    def __init__(self, options: SourceOptions) -> None:
        self.image_shape = options.image_shape

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Record:
        image = np.full(self.image_shape, index, np.uint8)
        return {"image": image, "label": np.int32(-1 if index == 4 else index % 2)}


def test_sources_outside_the_package_are_named_by_module() -> None:
    name = f"{__name__}:Stripes"
    source = make_source(name, image_size=4, channels=2, num_classes=3, on_corrupt="skip")
    assert isinstance(source, SkipUnreadable) and source.image_shape == (4, 4, 2)
    assert classes.describe(source)["names"] == ["thin", "wide"]
    with pytest.raises(DataError, match="record 4 of stripes has label -1.*\n.*labeled split"):
        next(make_batches(source, 0, 5))
    with pytest.raises(DataError, match="record 4 of stripes has label -1"):
        list(iterate_once(source, 5))
    with pytest.raises(DataError, match="2 classes, the label table 1"):
        make_source(name, image_size=4, num_classes=1)
    with pytest.raises(ConfigError, match="config.data.source.*has no 'Strips'"):
        make_source(f"{__name__}:Strips", image_size=4)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Six images of two classes; numbers 1, 2 and 5 are damaged."""
    make_folder(tmp_path, {"a": 4, "b": 2})
    for name in ("a/001.png", "a/002.png", "b/001.png"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:40])
    return tmp_path


def test_damaged_file_is_an_error_by_its_path(damaged: Path) -> None:
    source = make_source("folder", root=str(damaged), image_size=8, channels=3)
    assert source[0]["label"] == 0
    with pytest.raises(UnreadableRecord, match=r"a/001\.png.*\n.*on_corrupt=skip"):
        source[1]


def test_skip_takes_the_next_readable(damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = make_source("folder", root=str(damaged), image_size=8, channels=3, on_corrupt="skip")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            levels = [int(source[i]["image"][0, 0, 0]) for i in range(6)]
            assert levels == [0, 12, 12, 12, 16, 0]
    assert [int(source[i]["label"]) for i in range(6)] == [0, 0, 0, 0, 1, 0]
    for name in ("a/001.png", "a/002.png", "b/001.png"):
        assert caplog.text.count(name) == 1


def test_skip_does_not_hide_a_lost_disk(damaged: Path) -> None:
    source = make_source("folder", root=str(damaged), image_size=8, channels=3, on_corrupt="skip")
    (damaged / "a" / "003.png").unlink()
    with pytest.raises(DataError, match=r"a/003\.png cannot be read"):
        source[1]
    for path in damaged.rglob("*.png"):
        path.write_bytes(b"")
    (damaged / "a" / "003.png").touch()
    with pytest.raises(DataError, match="6 records .* in a row are unreadable"):
        source[0]


def test_skip_wraps_any_source(damaged: Path) -> None:
    inner = ImageFolder(SourceOptions(8, root=str(damaged)))
    source = SkipUnreadable(inner)
    assert (source.name, source.num_classes, source.image_shape, len(source)) == (
        inner.name,
        2,
        (8, 8, 3),
        6,
    )
