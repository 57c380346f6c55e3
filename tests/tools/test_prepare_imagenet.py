"""Shards made from archives and folders: content, resumption, verification, damage."""

import io
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsr_jax.core.errors import DataError, LockError
from dsr_jax.core.files import read_json, write_json
from dsr_jax.core.lock import FolderLock
from dsr_jax.data import classes
from dsr_jax.data.images import decode_image
from dsr_jax.data.sources import make_source
from tests.processes import running
from tools import prepare_imagenet

CLASSES = ("n01", "n02", "n03")
COUNT = 3


def image_file(seed: int, side: tuple[int, int] = (20, 30), kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*side, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


FILES = {
    name: {f"{name}_{i}.JPEG": image_file(10 * label + i) for i in range(COUNT)}
    for label, name in enumerate(CLASSES)
}


def tar_file(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(mode="w", fileobj=buffer) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, files in FILES.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for file, content in files.items():
            (tmp_path / "images" / name / file).write_bytes(content)
    return tmp_path / "images"


@pytest.fixture
def train_tar(tmp_path: Path) -> Path:
    inner = {f"{name}.tar": tar_file(FILES[name]) for name in reversed(CLASSES)}
    (tmp_path / "train.tar").write_bytes(tar_file(inner))
    return tmp_path / "train.tar"


def pack(source: Path, out: Path, *more: str) -> None:
    prepare_imagenet.main([str(source), str(out), "--shards=2", "--workers=1", "--size=16", *more])


def images(kind: str, root: Path, split: str = "train") -> list[tuple[np.ndarray, int]]:
    source = make_source(
        kind, root=str(root), split=split, image_size=16, channels=3, num_classes=len(CLASSES)
    )
    return [(source[i]["image"], int(source[i]["label"])) for i in range(len(source))]


def equal(got: list[tuple[np.ndarray, int]], want: list[tuple[np.ndarray, int]]) -> bool:
    return len(got) == len(want) and all(
        a[1] == b[1] and np.array_equal(a[0], b[0]) for a, b in zip(got, want, strict=True)
    )


def test_archives_and_folders_give_the_images_that_training_would_see(
    folder: Path, train_tar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    want = images("folder", folder)
    pack(folder, tmp_path / "a")
    pack(train_tar, tmp_path / "b")
    assert equal(images("arrayrecord", tmp_path / "a"), want)
    assert equal(images("arrayrecord", tmp_path / "b"), want)
    prepare_imagenet.main(["--verify", str(tmp_path / "b")])
    assert "train: 9 images in 2 shards" in capsys.readouterr().out
    assert read_json(tmp_path / "b" / "train.json")["class_names"] == list(CLASSES)


def test_validation_images_get_the_classes_of_a_file(folder: Path, tmp_path: Path) -> None:
    files = {name: content for each in FILES.values() for name, content in each.items()}
    (tmp_path / "val.tar").write_bytes(tar_file(files))
    with pytest.raises(DataError, match="class of n01_0.JPEG is not known"):
        pack(tmp_path / "val.tar", tmp_path / "packed", "--split=val")
    lines = [f"{file} {name}" for name, each in FILES.items() for file in each]
    (tmp_path / "val.txt").write_text("\n".join(lines))
    classes = f"--classes={tmp_path / 'val.txt'}"
    pack(tmp_path / "val.tar", tmp_path / "packed", "--split=val", "--format=keep", classes)
    assert equal(images("arrayrecord", tmp_path / "packed", "val"), images("folder", folder))


def test_packing_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    pack(folder, out)
    first, second = sorted(out.glob("*.array_record"))
    content, kept = second.read_bytes(), first.stat().st_mtime_ns
    second.unlink()
    with pytest.raises(DataError, match=f"{second.name} is missing"):
        prepare_imagenet.main(["--verify", str(out)])
    pack(folder, out)
    assert second.read_bytes() == content and first.stat().st_mtime_ns == kept
    second.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=f"{second.name} is damaged"):
        prepare_imagenet.main(["--verify", str(out)])
    pack(folder, out)
    assert second.read_bytes() == content and first.stat().st_mtime_ns == kept
    assert sorted(path.name for path in out.iterdir()) == [first.name, second.name, "train.json"]
    with pytest.raises(DataError, match="other settings.*format: png -> jpeg"):
        pack(folder, out, "--format=jpeg")


def test_damaged_images_are_named_or_left_out(folder: Path, tmp_path: Path) -> None:
    damaged = folder / "n02" / "n02_1.JPEG"
    damaged.write_bytes(damaged.read_bytes()[:40])
    with pytest.raises(DataError, match="n02_1.JPEG cannot be decoded"):
        pack(folder, tmp_path / "a")
    pack(folder, tmp_path / "b", "--on-corrupt=skip")
    shards = read_json(tmp_path / "b" / "train.json")["shards"].values()
    assert sum(shard["records"] for shard in shards) == 8
    assert ["n02_1.JPEG" in line for shard in shards for line in shard["skipped"]] == [True]
    assert len(images("arrayrecord", tmp_path / "b")) == 8


def test_an_archive_that_is_cut_off_is_named(train_tar: Path, tmp_path: Path) -> None:
    train_tar.write_bytes(train_tar.read_bytes()[:700])
    with pytest.raises(DataError, match="train.tar"):
        pack(train_tar, tmp_path / "packed")


def test_classes_and_counts_are_those_of_the_images(folder: Path, tmp_path: Path) -> None:
    (folder / "n02" / "n02_1.JPEG").unlink()
    pack(folder, tmp_path / "a")
    options = {"root": str(tmp_path / "a"), "image_size": 16, "channels": 3, "num_classes": 10}
    source = make_source("arrayrecord", **options)
    found = classes.describe(source)
    assert (found["names"], found["counts"]) == (list(CLASSES), [3, 2, 3])
    assert "7 rows stay untrained (3-9)" in classes.warnings_of(found, 10)[0]
    # The record of an older version has no counts; its shards are kept, and the classes known.
    path = tmp_path / "a" / "train.json"
    record = read_json(path)
    for shard in record["shards"].values():
        del shard["class_counts"]
    del record["recipe"]["class_map"]
    write_json(path, record)
    pack(folder, tmp_path / "a")
    old = classes.describe(make_source("arrayrecord", **options))
    assert (old["names"], old["counts"]) == (list(CLASSES), [])
    assert classes.trained_labels(old, 10) == [0, 1, 2]
    with pytest.raises(DataError, match="3 classes, the label table 2"):
        make_source("arrayrecord", **{**options, "num_classes": 2})


def test_a_class_map_sets_the_labels(folder: Path, train_tar: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("n03\nn01\nn02\n")
    for source in (folder, train_tar):
        out = tmp_path / f"packed_{source.name}"
        pack(source, out, f"--class-map={tmp_path / 'names.txt'}")
        packed = make_source("arrayrecord", root=str(out), image_size=16, channels=3)
        assert packed.class_names == ["n03", "n01", "n02"]
        want = decode_image(FILES["n03"]["n03_0.JPEG"], "", 16, 3)
        first = next(record for record in map(packed.__getitem__, range(9)) if record["label"] == 0)
        np.testing.assert_array_equal(first["image"], want)
        with pytest.raises(DataError, match="class_map: .*names.txt -> "):
            pack(source, out)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"shards": {"a": 3}}', b"[" * 10**5])
def test_a_damaged_record_is_named(folder: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.json").write_bytes(content)
    for words in (["--verify", str(tmp_path)], [str(folder), str(tmp_path), "--workers=1"]):
        with pytest.raises(DataError, match="train.json is damaged.*"):
            prepare_imagenet.main(words)


def test_one_command_at_a_time_packs_into_a_folder(folder: Path, tmp_path: Path) -> None:
    with FolderLock(tmp_path / "a"), pytest.raises(LockError, match="is in use by process"):
        pack(folder, tmp_path / "a")


@pytest.mark.slow
def test_a_killed_command_leaves_no_worker_and_is_continued(folder: Path, tmp_path: Path) -> None:
    content = image_file(0, (400, 400))
    for number in range(60):
        (folder / "n01" / f"large_{number}.JPEG").write_bytes(content)
    words = [str(folder), str(tmp_path / "a"), "--shards=12", "--workers=2"]
    command = subprocess.Popen([sys.executable, prepare_imagenet.__file__, *words])
    while not list((tmp_path / "a").glob("*.array_record")):
        assert command.poll() is None
        time.sleep(0.01)
    workers = [pid for pid, parent in running().items() if parent == command.pid]
    command.kill()
    command.wait()
    assert workers
    deadline = time.monotonic() + 20
    while set(workers) & set(running()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(workers) & set(running())
    prepare_imagenet.main(words)
    assert {path.suffix for path in (tmp_path / "a").iterdir()} == {".array_record", ".json"}
    assert len(list((tmp_path / "a").iterdir())) == 13
    prepare_imagenet.main(["--verify", str(tmp_path / "a")])
    prepare_imagenet.main([str(folder), str(tmp_path / "b"), *words[2:]])
    for path in (tmp_path / "b").glob("*.array_record"):
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()
