"""Classes of a data source: their record in a run, and messages about changes."""

from pathlib import Path

import pytest

from dsr_jax.core.errors import DataError
from dsr_jax.data import classes
from dsr_jax.data.sources import make_source
from tests.data.test_sources import make_folder


def describe(root: Path, on_corrupt: str = "error") -> classes.DataDescription:
    options = {"image_size": 8, "channels": 3, "num_classes": 20, "on_corrupt": on_corrupt}
    return classes.describe(make_source("folder", root=str(root), **options))


def test_a_folder_is_described_by_names_counts_and_listing(tmp_path: Path) -> None:
    found = describe(make_folder(tmp_path / "a", {"owl": 1, "cat": 3}))
    assert (found["names"], found["counts"], found["images"]) == (["cat", "owl"], [3, 1], 4)
    moved = describe(make_folder(tmp_path / "b", {"owl": 1, "cat": 3}), on_corrupt="skip")
    assert moved["fingerprint"] == found["fingerprint"] and moved["counts"] == [3, 1]
    (tmp_path / "b" / "cat" / "000.png").rename(tmp_path / "b" / "cat" / "zzz.png")
    renamed = describe(tmp_path / "b")
    assert renamed["fingerprint"] != found["fingerprint"]
    assert classes.compare(found, renamed) == [
        "files of the data set were renamed, or others took their place"
    ]


def test_toy_data_sets_are_described() -> None:
    digits = classes.describe(make_source("digits", image_size=8, channels=1))
    assert digits["names"] == [str(i) for i in range(10)]
    assert sum(digits["counts"]) == digits["images"] == 1437
    shapes = classes.describe(make_source("synthetic", image_size=8, channels=1, num_classes=7))
    assert shapes["names"] == shapes["counts"] == []
    assert classes.trained_labels(shapes, 7) == list(range(7))
    assert not classes.warnings_of(digits, 10) and not classes.warnings_of(shapes, 7)


def test_the_file_of_a_run_is_read_back(tmp_path: Path) -> None:
    assert classes.read_class_names(tmp_path) is None
    found = describe(make_folder(tmp_path / "data", {"owl": 1, "cat": 3}))
    classes.write_class_names(tmp_path, found)
    assert classes.read_class_names(tmp_path) == found
    assert classes.label_of(found, "owl") == 1
    with pytest.raises(DataError, match="no class is called 'dog'.*\n.*cat, owl"):
        classes.label_of(found, "dog")
    bad = (b"{", b"[]", b'{"names": [1], "counts": [], "fingerprint": ""}', b"\xff", b"[" * 10**5)
    for content in bad:
        (tmp_path / classes.FILE).write_bytes(content)
        with pytest.raises(DataError, match="class_names.json.*\n.*delete it"):
            classes.read_class_names(tmp_path)


def test_rows_without_images_are_named(tmp_path: Path) -> None:
    found = describe(make_folder(tmp_path, {"cat": 2, "dog": 1, "owl": 1}))
    assert classes.trained_labels(found, 10) == [0, 1, 2]
    (text,) = classes.warnings_of(found, 10)
    assert "images of 3 classes" in text and "7 rows stay untrained (3-9)" in text
    assert "config.data.num_classes=3" in text and not classes.warnings_of(found, 3)
    gaps: classes.DataDescription = {**found, "names": list("abcde"), "counts": [0, 1, 0, 1, 0]}
    assert classes.trained_labels(gaps, 6) == [1, 3]
    assert "4 rows stay untrained (0, 2, 4-5)" in classes.warnings_of(gaps, 6)[0]


def test_numbers_in_the_order_of_strings_are_pointed_out(tmp_path: Path) -> None:
    found = describe(make_folder(tmp_path / "a", {str(i): 1 for i in range(12)}))
    assert found["names"][2] == "10"
    (text,) = classes.warnings_of(found, 12)
    assert "class '10' has label 2" in text and "config.data.class_map" in text
    padded = describe(make_folder(tmp_path / "b", {f"{i:02}": 1 for i in range(12)}))
    assert not classes.warnings_of(padded, 12)


def test_what_changed_is_named(tmp_path: Path) -> None:
    old = describe(make_folder(tmp_path / "a", {"cat": 2, "dog": 1, "owl": 1}))
    new = describe(make_folder(tmp_path / "b", {"bee": 1, "cat": 2, "owl": 2}))
    assert classes.compare(old, old) == []
    assert classes.compare(old, new) == [
        "class 'dog' (label 1) vanished",
        "class 'bee' (label 0) appeared",
        "class 'cat': label 0 -> 1",
        "images: 4 -> 5",
    ]
    more = describe(make_folder(tmp_path / "c", {"cat": 2, "dog": 1, "owl": 3}))
    assert classes.compare(old, more) == ["class 'owl': 1 -> 3 images", "images: 4 -> 6"]
