"""The stream is a function of (seed, step): on any number of hosts, and after any resume."""

import collections
import itertools
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsr_jax.core.errors import DataError, UnreadableRecord
from dsr_jax.data import pipeline
from dsr_jax.data.base import Record
from dsr_jax.data.pipeline import HostBatch, iterate_once, make_batches, record_numbers
from dsr_jax.data.sources import make_source
from tests.processes import running


class Numbers:
    """Record i is a 1 x 2 image (i, 255 - i): unique, and its flip can be seen."""

    name = "numbers"
    num_classes = 3
    image_shape = (1, 2, 1)

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Record:
        image = np.array([index, 255 - index], np.uint8).reshape(self.image_shape)
        return {"image": image, "label": np.int32(index % 3)}


class Coordinates:
    """Record i is an image of its own size whose pixels hold their row and column."""

    name = "coordinates"
    num_classes = 1
    image_shape = (6, 6, 2)

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Record:
        rows, columns = np.mgrid[: 6 + index % 3, : 6 + index % 2]
        image = np.stack([rows, columns], axis=-1).astype(np.uint8)
        return {"image": image, "label": np.int32(0)}


@pytest.mark.parametrize("flip", [False, True])
def test_positions_lead_to_record_numbers(flip: bool) -> None:
    batches = make_batches(Numbers(23), 5, 8, start_step=2, flip=flip)
    for _ in range(6):
        batch = next(batches)
        # The smaller of i and 255 - i is i, mirrored or not.
        numbers = batch["image"].reshape(8, 2).min(axis=1).tolist()
        assert record_numbers(23, 5, batch["index"].tolist()) == numbers


def test_reading_ahead_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A consumer that stops taking batches stops the readers, too."""
    reads: list[int] = []

    # A class of its own: readers of the test before may still have a batch under way.
    class Counted(Numbers):
        def __getitem__(self, index: int) -> Record:
            reads.append(index)
            return super().__getitem__(index)

    monkeypatch.setattr(pipeline, "PREFETCH_BYTES", 0)
    batches = make_batches(Counted(64), 0, 4)
    for taken in range(1, 4):
        next(batches)
        time.sleep(0.5)
        # Those that were taken and two that wait or are under way. The records repeat without
        # end, so readers that nothing stopped would soon be far ahead.
        assert len(reads) <= 4 * (taken + 2)


def test_crops_are_random_squares_fixed_by_the_sample() -> None:
    def crops(hosts: int, start: int, seed: int = 0) -> np.ndarray:
        parts = [
            next(
                make_batches(
                    Coordinates(),
                    seed,
                    8,
                    start_step=start,
                    rows=rows,
                    crop=4,
                )
            )["image"]
            for rows in split_rows(8, hosts)
        ]
        return together(parts, split_rows(8, hosts))

    images = np.concatenate([crops(1, step) for step in range(20)])
    corners = images[:, 0, 0]
    np.testing.assert_array_equal(images[:, 3, 3], corners + 3)
    assert [sorted(set(places)) for places in corners.T.tolist()] == [[*range(5)], [*range(4)]]
    np.testing.assert_array_equal(crops(2, 3), images[24:32])
    assert (crops(1, 3, seed=1) != images[24:32]).any()
    with pytest.raises(DataError, match="too small for squares of 9.*\n.*crop_from"):
        next(make_batches(Coordinates(), 0, 8, crop=9))


def split_rows(size: int, hosts: int, interleaved: bool = False) -> list[np.ndarray]:
    """The rows of each of `hosts` processes: one stretch, or every n-th pair of rows."""
    if interleaved:
        return [np.flatnonzero(np.arange(size) // 2 % hosts == host) for host in range(hosts)]
    return np.split(np.arange(size), hosts)


def together(parts: list[np.ndarray], rows: list[np.ndarray]) -> np.ndarray:
    """The global array whose rows the processes have read."""
    return np.concatenate(parts)[np.argsort(np.concatenate(rows), kind="stable")]


def global_batches(
    num: int, hosts: int, start_step: int = 0, *, interleaved: bool = False, **options: object
) -> list[HostBatch]:
    """`num` global batches of 8, put together from the rows that `hosts` processes read."""
    split = split_rows(8, hosts, interleaved)
    iterators: list[Iterator[HostBatch]] = [
        make_batches(
            Numbers(50),
            seed=3,
            global_batch=8,
            start_step=start_step,
            rows=rows,
            **{"flip": True, **options},
        )
        for rows in split
    ]
    result = []
    for _ in range(num):
        parts = [next(iterator) for iterator in iterators]
        assert all(len(part["image"]) == 8 // hosts for part in parts)
        result.append({key: together([p[key] for p in parts], split) for key in parts[0]})
    for iterator in iterators:
        iterator.close()
    return result


def assert_equal(left: list[HostBatch], right: list[HostBatch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def numbers(batches: list[HostBatch]) -> list[int]:
    """Record numbers in order, whether flipped or not."""
    images = np.concatenate([batch["image"] for batch in batches]).reshape(-1, 2)
    return [int(value) for value in images.min(axis=-1)]


def test_types_and_positions() -> None:
    batches = global_batches(3, 1)
    batch = batches[2]
    assert batch["image"].dtype == np.uint8 and batch["image"].shape == (8, 1, 2, 1)
    assert batch["label"].dtype == np.int32 and batch["label"].shape == (8,)
    assert batch["index"].dtype == np.int64
    np.testing.assert_array_equal(batch["index"], np.arange(16, 24))
    np.testing.assert_array_equal(batch["label"], np.array(numbers([batch])) % 3)


def test_the_same_on_1_2_and_4_hosts() -> None:
    one = global_batches(12, 1)
    assert_equal(one, global_batches(12, 2))
    assert_equal(one, global_batches(12, 4))
    assert_equal(one, global_batches(12, 2, interleaved=True))


def test_rows_that_two_processes_hold_are_read_by_both() -> None:
    """As where a mesh axis that does not split the batch reaches over processes."""
    both = [make_batches(Numbers(50), 3, 8, rows=range(2, 6), flip=True) for _ in range(2)]
    for whole in global_batches(3, 1):
        for batch in map(next, both):
            for key, value in batch.items():
                np.testing.assert_array_equal(value, whole[key][2:6], err_msg=key)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_resume_on_another_count(hosts: int) -> None:
    assert_equal(global_batches(15, 2)[9:], global_batches(6, hosts, start_step=9))


def test_each_record_once_per_epoch_in_a_new_order() -> None:
    stream = numbers(global_batches(25, 2))
    epochs = [stream[start : start + 50] for start in range(0, 200, 50)]
    for epoch in epochs:
        assert collections.Counter(epoch) == collections.Counter(range(50))
    for a, b in itertools.combinations(epochs, 2):
        assert a != b
    assert epochs[0] != list(range(50))


def test_flips_follow_position_and_do_not_move_the_order() -> None:
    straight, flipped = global_batches(50, 1, flip=False), global_batches(50, 1)
    assert numbers(straight) == numbers(flipped)
    different = [
        bool((a != b).any())
        for x, y in zip(straight, flipped, strict=True)
        for a, b in zip(x["image"], y["image"], strict=True)
    ]
    assert 140 < sum(different) < 260  # 400 fair coins: six standard deviations
    first, second = different[:50], different[50:100]
    assert first != second


def test_seeds_differ() -> None:
    first, second = (next(make_batches(Numbers(50), seed, 50)) for seed in (0, 1))
    assert numbers([first]) != numbers([second])


def test_damaged_files_do_not_break_the_stream(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for i in range(6):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(tmp_path / "a" / f"{i}.png")
    (tmp_path / "a" / "4.png").write_bytes(b"damaged")

    def read(on_corrupt: str, hosts: int) -> list[np.ndarray]:
        source = make_source(
            "folder", root=str(tmp_path), image_size=4, channels=3, on_corrupt=on_corrupt
        )
        iterators = [make_batches(source, 0, 4, rows=rows) for rows in split_rows(4, hosts)]
        return [np.concatenate([next(it)["image"] for it in iterators]) for _ in range(3)]

    skipped = read("skip", 1)
    np.testing.assert_array_equal(skipped, read("skip", 2))
    values = collections.Counter(np.stack(skipped)[..., 0, 0, 0].reshape(-1).tolist())
    assert values == {0: 2, 1: 2, 2: 2, 3: 2, 5: 4}
    with pytest.raises(UnreadableRecord, match=r"4\.png"):
        read("error", 2)


def test_batches_that_cannot_be_made() -> None:
    with pytest.raises(DataError, match=r"rows \[4, 5, 6\] of a batch of 6"):
        make_batches(Numbers(9), 0, 6, rows=range(4, 7))
    with pytest.raises(DataError, match="rows .* of a batch of 6"):
        make_batches(Numbers(9), 0, 6, rows=[])
    with pytest.raises(DataError, match="global batch of 0"):
        make_batches(Numbers(9), 0, 0)
    with pytest.raises(DataError, match="numbers has no records"):
        make_batches(Numbers(0), 0, 6)
    with pytest.raises(DataError, match="seed -1"):
        make_batches(Numbers(9), -1, 6)


def test_batch_larger_than_the_data_set(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        batch = next(make_batches(Numbers(5), 0, 10))
    assert collections.Counter(numbers([batch])) == dict.fromkeys(range(5), 2)
    assert "more than once" in caplog.text


@pytest.mark.parametrize("hosts", [1, 2])
def test_one_ordered_pass(hosts: int) -> None:
    passes = [list(iterate_once(Numbers(13), 8, rows=rows)) for rows in split_rows(8, hosts)]
    batches = [
        {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
        for parts in zip(*passes, strict=True)
    ]
    assert [len(batch["mask"]) for batch in batches] == [8, 8]
    mask = np.concatenate([batch["mask"] for batch in batches])
    np.testing.assert_array_equal(mask, np.arange(16) < 13)
    np.testing.assert_array_equal(np.concatenate([b["index"] for b in batches]), np.arange(16))
    images = np.concatenate([batch["image"] for batch in batches])
    np.testing.assert_array_equal(images[:13, 0, 0, 0], np.arange(13))
    assert not images[13:].any()


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [1, 2])
def test_worker_processes_give_the_same_stream(hosts: int) -> None:
    in_process = global_batches(7, hosts, start_step=2)
    assert_equal(in_process, global_batches(7, hosts, start_step=2, workers=2))


@pytest.mark.slow
def test_damage_is_reported_from_worker_processes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "bad.png").write_bytes(b"damaged")
    source = make_source("folder", root=str(tmp_path), image_size=4, channels=3)
    with pytest.raises(UnreadableRecord, match=r"bad\.png.*\n.*on_corrupt=skip"):
        next(make_batches(source, 0, 1, workers=1))


def test_batches_of_one() -> None:
    stream = itertools.islice(make_batches(Numbers(4), 0, 1), 8)
    assert collections.Counter(numbers(list(stream))) == dict.fromkeys(range(4), 2)


READER = """
import sys, time
from dsr_jax.data.pipeline import make_batches
from dsr_jax.data.sources import make_source

if __name__ == "__main__":
    batches = make_batches(make_source("synthetic", image_size=8, channels=1), 0, 4, workers=2)
    next(batches)
    print("reading", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_worker_processes_end_with_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "reader.py").write_text(READER)
    command = [sys.executable, str(tmp_path / "reader.py")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "reading\n"
    workers = [pid for pid, its_parent in running().items() if its_parent == parent.pid]
    assert len(workers) >= 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while set(workers) & set(running()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(workers) & set(running())
