"""Labels follow the order of strings, or a class-map file."""

import json
from pathlib import Path

import pytest

from dsr_jax.core.errors import DataError
from dsr_jax.data.class_map import MAX_BYTES, labels_of, names_by_label, read_class_map
from dsr_jax.data.classes import describe, trained_labels, warnings_of
from dsr_jax.data.sources import make_source
from tests.data.test_sources import make_folder


def test_numbers_get_their_own_labels_from_a_map(tmp_path: Path) -> None:
    """The remedy of the warning about names that are numbers removes the warning."""
    make_folder(tmp_path / "data", {str(i): 1 + i % 2 for i in range(12)})
    (tmp_path / "names.txt").write_text("".join(f"{i}\n" for i in range(12)))
    options = {"root": str(tmp_path / "data"), "image_size": 8, "channels": 3, "num_classes": 12}
    source = make_source("folder", class_map=str(tmp_path / "names.txt"), **options)
    assert source.class_names == [str(i) for i in range(12)]
    assert [int(source[i]["label"]) for i in range(6)] == [0, 1, 1, 2, 3, 3]
    # Folder "2" has the ninth image in the order of strings: 0, 1, 1, 10, 11, 11, 2.
    assert source[3]["image"][0, 0, 0] == 6 * 4
    assert not warnings_of(describe(source), 12)
    assert warnings_of(describe(make_source("folder", **options)), 12)


def test_maps_may_hold_more_classes_than_the_data(tmp_path: Path) -> None:
    make_folder(tmp_path / "data", {"owl": 2, "cat": 1})
    (tmp_path / "map.json").write_text(json.dumps({"owl": 1, "dog": 2, "cat": 4}))
    options = {"root": str(tmp_path / "data"), "image_size": 8, "channels": 3}
    source = make_source("folder", class_map=str(tmp_path / "map.json"), **options)
    assert source.class_names == ["", "owl", "dog", "", "cat"] and source.num_classes == 5
    assert source.class_counts == [0, 2, 0, 0, 1]
    assert [int(source[i]["label"]) for i in range(3)] == [1, 1, 4]
    assert trained_labels(describe(source), 10) == [1, 4]
    with pytest.raises(DataError, match="5 classes, the label table 4"):
        make_source("folder", class_map=str(tmp_path / "map.json"), num_classes=4, **options)
    (tmp_path / "list.json").write_text(json.dumps(["owl", "dog"]))
    with pytest.raises(DataError, match="list.json lacks 1 classes of the data set: cat"):
        make_source("folder", class_map=str(tmp_path / "list.json"), **options)
    with pytest.raises(DataError, match="'digits' has its own labels"):
        make_source("digits", image_size=8, channels=1, class_map="names.txt")


def test_without_a_map_labels_follow_strings() -> None:
    assert labels_of(["b", "a", "10", "9"]) == {"10": 0, "9": 1, "a": 2, "b": 3}
    assert names_by_label({"b": 2, "a": 0}) == ["a", "", "b"]


def test_a_byte_order_mark_is_not_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "m.txt").write_text("cat\ndog\n", encoding="utf-8-sig")
    (tmp_path / "m.json").write_text('["cat", "dog"]', encoding="utf-8-sig")
    for name in ("m.txt", "m.json"):
        assert read_class_map(tmp_path / name) == {"cat": 0, "dog": 1}


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("m.txt", "", "no classes"),
        ("m.txt", "cat\ndog\ncat\n", "'cat', label 2, is there twice"),
        ("m.json", '{"cat": 0, "cat": 1}', "'cat', label 1, is there twice"),
        ("m.json", '{"cat": 0, "dog": 0}', "'dog', label 0, is there twice: also class 'cat'"),
        ("m.json", '{"cat": -1}', "label of 'cat' is -1"),
        ("m.json", '{"cat": true}', "label of 'cat' is True"),
        ("m.json", '{"cat": 9999999999}', "label of 'cat'"),
        ("m.json", '{"0": ["n01", "tench"]}', "label of '0' is"),
        ("m.json", "[1]", "name of label 0 is 1"),
        ("m.json", "{", "cannot be read"),
        ("m.json", "[" * 100_000, "cannot be read"),
        ("m.json", '"cat"', "no classes"),
        ("m.txt", "x" * (MAX_BYTES + 1), "more than 16777216 bytes"),
    ],
)
def test_wrong_maps_are_named(tmp_path: Path, name: str, content: str, problem: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"class map .*{name}.*{problem}"):
        read_class_map(tmp_path / name)
    with pytest.raises(DataError, match="none.txt cannot be read"):
        read_class_map(tmp_path / "none.txt")
