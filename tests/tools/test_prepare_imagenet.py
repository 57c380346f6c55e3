"""Shards made from archives and folders: content, resumption, verification, damage."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsr_jax.core.errors import DataError
from dsr_jax.core.files import read_json
from dsr_jax.data.sources import make_source
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
