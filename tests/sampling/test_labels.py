"""Label tables: balance, prefixes, files, and errors that name the sample."""

import numpy as np
import pytest

from dsr_jax.core.errors import DataError
from dsr_jax.sampling import labels as labels_lib

PINNED_BALANCED = [4, 3, 0, 2, 1, 4, 1, 0, 2, 3, 4, 1]
PINNED_RANDOM = [2, 3, 3, 2, 2, 3, 2, 4, 4, 1, 3, 2]


@pytest.mark.parametrize(("num", "classes"), [(50, 10), (53, 10), (7, 10), (1000, 1)])
def test_balanced_counts_differ_by_at_most_one(num, classes):
    labels = labels_lib.balanced_labels(num, range(classes), seed=3)
    counts = np.bincount(labels, minlength=classes)
    assert labels.dtype == np.int32 and labels.shape == (num,)
    assert counts.max() - counts.min() == (0 if num % classes == 0 else 1)


def test_label_of_a_sample_does_not_depend_on_the_number_of_samples():
    for make in (labels_lib.balanced_labels, labels_lib.random_labels):
        np.testing.assert_array_equal(
            make(35, range(10), seed=1), make(500, range(10), seed=1)[:35]
        )


def test_labels_depend_on_the_seed_and_are_not_in_class_order():
    first, second = (labels_lib.balanced_labels(100, range(10), seed=seed) for seed in (0, 1))
    assert (first != second).any()
    assert (first[:10] != np.arange(10)).any() and (first[:10] != first[10:20]).any()


def test_tables_are_pinned():
    """Published samples name only a seed, so the table of a seed must never change."""
    assert labels_lib.balanced_labels(12, range(5), seed=0).tolist() == PINNED_BALANCED
    assert labels_lib.random_labels(12, range(5), seed=0).tolist() == PINNED_RANDOM


def test_random_labels_cover_all_classes_about_equally():
    counts = np.bincount(labels_lib.random_labels(10_000, range(10), seed=0), minlength=10)
    assert len(counts) == 10 and counts.min() > 850 and counts.max() < 1150


def test_labels_of_some_classes_are_those_alone():
    for make in (labels_lib.balanced_labels, labels_lib.random_labels):
        labels = make(30, [2, 5, 9], seed=0)
        assert labels.dtype == np.int32 and set(labels) == {2, 5, 9}
    assert np.bincount(labels_lib.balanced_labels(30, [2, 5, 9], seed=0))[[2, 5, 9]].tolist() == [
        10,
        10,
        10,
    ]


def test_cycled_labels():
    assert labels_lib.cycled_labels([7, 2, 7], 5).tolist() == [7, 2, 7, 7, 2]
    with pytest.raises(DataError, match="empty"):
        labels_lib.cycled_labels([], 5)
    with pytest.raises(DataError, match="99999999999 .* beyond 32 bits"):
        labels_lib.cycled_labels([3, 99999999999], 5)


def test_label_files_of_each_kind(tmp_path):
    table = np.array([4, 0, 2, 9, 1], np.int64)
    np.save(tmp_path / "a.npy", table)
    np.savez(tmp_path / "b.npz", arr_0=np.zeros((5, 2, 2, 1), np.uint8), labels=table)
    np.savez(tmp_path / "c.npz", by_rank=table.reshape(1, 5), by_index=table)
    (tmp_path / "d.txt").write_text("4 0 2\n9\n1\n")
    for name in ("a.npy", "b.npz", "c.npz", "d.txt"):
        labels = labels_lib.load_labels(tmp_path / name, 4)
        assert labels.dtype == np.int32 and labels.tolist() == [4, 0, 2, 9], name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.npy", np.arange(3), "holds 3 labels, 4 are needed"),
        ("float.npy", np.zeros(9), "float64"),
        ("square.npy", np.zeros((4, 4), int), r"\(4, 4\)"),
        ("object.npy", np.array([1, 2, 3, "x", None], object), "cannot be read"),
        ("huge.npy", np.full(4, 2**40), "32 bits"),
        ("wrapped.npy", np.full(4, 2**63, np.uint64), "32 bits"),
        ("lowest.npy", np.full(4, -(2**63)), "32 bits"),
        ("huge.txt", f"{2**70} 1 2 3", "cannot be read"),
        ("cut.npz", "PK", "cannot be read"),
        ("array.npz", np.arange(4), "should end in .npy"),
        ("words.txt", "1 2 drei 4", "drei"),
        ("table.csv", "1,2,3,4", "unknown ending"),
    ],
)
def test_bad_label_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    else:
        with open(path, "wb") as file:
            np.save(file, content, allow_pickle=True)
    with pytest.raises(DataError, match=message) as caught:
        labels_lib.load_labels(path, 4)
    assert name in str(caught.value)


def test_missing_and_ambiguous_label_files(tmp_path):
    with pytest.raises(DataError, match="not found"):
        labels_lib.load_labels(tmp_path / "none.npy", 4)
    np.savez(tmp_path / "two.npz", one=np.arange(4), two=np.arange(4))
    with pytest.raises(DataError, match="one-dimensional arrays are"):
        labels_lib.load_labels(tmp_path / "two.npz", 4)
    (tmp_path / "two.npz").rename(tmp_path / "two.npy")
    with pytest.raises(DataError, match=r"should end in \.npz"):
        labels_lib.load_labels(tmp_path / "two.npy", 4)


def test_labels_outside_the_classes_are_named():
    labels_lib.check_labels(np.array([0, 9]), 10)
    with pytest.raises(DataError, match="sample 2 has label 10, and 1 of 3"):
        labels_lib.check_labels(np.array([0, 9, 10]), 10)
    with pytest.raises(DataError, match="sample 0 has label -1"):
        labels_lib.check_labels(np.array([-1, 3]), 10)
