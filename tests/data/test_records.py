"""Packed data sets hold what the files held."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsr_jax.core.errors import DataError, UnreadableRecord
from dsr_jax.data.pipeline import make_batches
from dsr_jax.data.records import write_array_records
from dsr_jax.data.sources import make_source


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Two training files of three gray images each, the last damaged; labels 0 .. 5."""
    pytest.importorskip("array_record.python.array_record_module")
    contents = []
    for level in range(6):
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(buffer, "PNG")
        contents.append(buffer.getvalue())
    contents[5] = contents[5][:30]
    for shard in range(2):
        images = [(contents[i], i) for i in range(3 * shard, 3 * shard + 3)]
        write_array_records(tmp_path / f"train-{shard}.array_record", images)
    return tmp_path


def test_array_records(packed: Path) -> None:
    options = {"root": str(packed), "image_size": 4, "channels": 3, "num_classes": 6}
    source = make_source("arrayrecord", **options)
    assert len(source) == 6 and source[4]["image"].shape == (4, 4, 3)
    assert [int(source[i]["label"]) for i in range(5)] == list(range(5))
    assert [int(source[i]["image"][0, 0, 0]) for i in range(5)] == list(range(5))
    with pytest.raises(UnreadableRecord, match="5 of arrayrecord"):
        source[5]
    skipping = make_source("arrayrecord", on_corrupt="skip", **options)
    batch = next(make_batches(skipping, 0, 6))
    assert sorted(batch["label"].tolist()) == [0, 0, 1, 2, 3, 4]


def test_array_records_that_do_not_fit(packed: Path) -> None:
    options = {"root": str(packed), "image_size": 4, "channels": 3}
    with pytest.raises(DataError, match="num_classes"):
        make_source("arrayrecord", **options)
    with pytest.raises(DataError, match=r"no val-\*.array_record"):
        make_source("arrayrecord", split="val", num_classes=6, **options)
    with pytest.raises(
        DataError, match="record [2-4] .* has label [2-4], which is not in 0 to 1\n.*num_classes"
    ):
        next(make_batches(make_source("arrayrecord", num_classes=2, **options), 0, 5))


def test_packing_a_folder(tmp_path: Path) -> None:
    """The packed source is the folder, record by record."""
    pytest.importorskip("array_record.python.array_record_module")
    rng = np.random.default_rng(0)
    for name, count in (("ant", 3), ("bee", 4)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (9, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.jpg")
    folder = make_source("folder", root=str(tmp_path / "images"), image_size=4, channels=3)
    (tmp_path / "packed").mkdir()
    names = [f"train-{i:05d}-of-00003.array_record" for i in range(3)]
    for name, rows in zip(names, (range(3), range(3, 5), range(5, 7)), strict=True):
        write_array_records(tmp_path / "packed" / name, map(folder.encoded, rows))
    options = {"image_size": 4, "channels": 3, "num_classes": 2}
    folder = make_source("folder", root=str(tmp_path / "images"), **options)
    packed = make_source("arrayrecord", root=str(tmp_path / "packed"), **options)
    assert len(folder) == len(packed) == 7
    for i in range(7):
        np.testing.assert_array_equal(folder[i]["image"], packed[i]["image"])
        assert folder[i]["label"] == packed[i]["label"]
    (tmp_path / "packed" / names[1]).unlink()
    with pytest.raises(DataError, match="2 files .* is one of 00003"):
        make_source("arrayrecord", root=str(tmp_path / "packed"), **options)


def test_tfds(tmp_path: Path) -> None:
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=4):
        source = make_source("tfds:mnist", image_size=14, channels=3, num_classes=10)
        assert len(source) == 4 and source.num_classes == 10
        record = source[1]
        assert record["image"].dtype == np.uint8 and record["image"].shape == (14, 14, 3)
        assert record["image"].std() > 0 and 0 <= record["label"] < 10
        image = np.zeros((4, 4, 1), np.uint8)
        records = [b"cut", {"image": image}, {"image": image, "label": "seven"}]
        records += [{"image": x, "label": 7} for x in (image.astype(float), image[..., 0])]
        source._records = records
        for index in range(5):
            problem = "is damaged" if index < 3 else "are arrays of"
            with pytest.raises(
                DataError, match=f"of tfds mnist train in its default folder {problem}"
            ):
                source[index]
    with pytest.raises(DataError, match="TFDS cannot open 'mnist'"):
        make_source("tfds:mnist", root=str(tmp_path), image_size=14, channels=1)


@pytest.mark.parametrize("limit", [0, 100_000])
def test_a_full_disk_is_named(tmp_path: Path, limit: int) -> None:
    """ArrayRecord itself raises a RuntimeError. A limit on file sizes stands for the full disk."""
    path = tmp_path / "train-00000.array_record"
    code = (
        "import random, resource, sys\n"
        "from pathlib import Path\n"
        "from dsr_jax.data.records import write_records\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "write_records(Path(sys.argv[1]), (random.Random(i).randbytes(50_000) for i in range(9)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert f"StorageError: {path} cannot be written: " in done.stderr
    assert list(tmp_path.iterdir()) == []
