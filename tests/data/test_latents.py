"""Cached latents: what is written is read, and what is missing or damaged is named."""

from pathlib import Path

import numpy as np
import pytest

from dsr_jax.core import files
from dsr_jax.core.errors import DataError
from dsr_jax.data.classes import describe
from dsr_jax.data.latents import (
    DIGESTS,
    DTYPES,
    CachedLatents,
    read_manifest,
    remove_damaged,
    shard_path,
    write_manifest,
    write_shard,
)
from dsr_jax.data.pipeline import make_batches
from dsr_jax.data.sources import check_label_table

SHAPE = (2, 3, 4)
LATENTS = np.random.default_rng(0).standard_normal((6, *SHAPE)).astype(np.float32)


DATA = {"names": ["cat", "dog", "owl"], "counts": [2, 2, 2], "fingerprint": "sha256:0"}


def save(folder: Path, dtype: str = "float32", shards: int = 2) -> None:
    manifest = {"shape": SHAPE, "dtype": dtype, "records": 6, "shards": shards, "num_classes": 3}
    manifest["data"] = DATA
    write_manifest(folder, manifest)
    for shard in range(shards):
        rows = range(6)[shard * 6 // shards : (shard + 1) * 6 // shards]
        write_shard(folder, shard, shards, [(LATENTS[i], i % 3) for i in rows], dtype)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_records_are_read_in_the_order_of_writing(tmp_path: Path, dtype: str) -> None:
    save(tmp_path, dtype)
    source = CachedLatents(tmp_path)
    assert (len(source), source.num_classes, source.image_shape) == (6, 3, SHAPE)
    for i in range(6):
        assert source[i]["image"].dtype == DTYPES[dtype] and source[i]["label"] == i % 3
        np.testing.assert_array_equal(source[i]["image"], LATENTS[i].astype(DTYPES[dtype]))


def test_worker_processes_hand_over_the_same_batches(tmp_path: Path) -> None:
    save(tmp_path, "bfloat16")
    source = CachedLatents(tmp_path)
    here, there = (make_batches(source, 0, 4, workers=workers) for workers in (0, 1))
    for _ in range(2):
        a, b = next(here), next(there)
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])
    here.close()
    there.close()


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="latents.json is missing"):
        CachedLatents(tmp_path)
    save(tmp_path)
    path = shard_path(tmp_path, 1, 2)
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(DataError, match=f"lacks 1 of 2 shards, the first {path.name}"):
        CachedLatents(tmp_path)
    path.write_bytes(content)
    write_manifest(tmp_path, read_manifest(tmp_path) | {"records": 7})
    with pytest.raises(DataError, match="holds 6 latents, but latents.json records 7"):
        CachedLatents(tmp_path)
    write_manifest(tmp_path, read_manifest(tmp_path) | {"records": 6, "shape": (3, 3, 4)})
    with pytest.raises(DataError, match="record 0 of .* is damaged"):
        CachedLatents(tmp_path)[0]


def test_a_value_that_the_dtype_does_not_hold_is_refused(tmp_path: Path) -> None:
    path = shard_path(tmp_path, 0, 1)
    with pytest.raises(DataError, match="float16 does not hold.*\n.*bfloat16"):
        write_shard(tmp_path, 0, 1, [(LATENTS[0] + 1e6, 0)], "float16")
    assert not path.exists()


@pytest.mark.parametrize("digests", ["kept", "absent", "damaged"])
@pytest.mark.parametrize("fault", ["none", "flipped", "cut", "empty", "short"])
def test_damaged_shards_are_removed(tmp_path: Path, fault: str, digests: str) -> None:
    """Also without the file of digests, as in caches of earlier versions."""
    save(tmp_path)
    path = shard_path(tmp_path, 1, 2)
    content = bytearray(path.read_bytes())
    # Within the second record: the file begins with blocks of padding.
    where = content.find(LATENTS[4].tobytes()[:16])
    content[where if where > 0 else len(content) - 20] ^= 1 if fault == "flipped" else 0
    path.write_bytes(content[: {"cut": len(content) // 2, "empty": 0}.get(fault, len(content))])
    if digests == "absent":
        (tmp_path / DIGESTS).unlink()
    elif digests == "damaged":
        (tmp_path / DIGESTS).write_text("[")
    sizes = [3, 2 if fault == "short" and digests != "kept" else 3]
    found = remove_damaged(tmp_path, sizes)
    whole = fault == "none" or (fault == "short" and digests == "kept")
    assert found == ([] if whole else [path]) and path.exists() == whole
    assert remove_damaged(tmp_path, sizes) == []


def test_a_shard_has_its_digest_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a command that is killed in between leaves no shard without a digest."""
    rename, seen = files.rename_synced, []

    def watch(source: Path, target: Path) -> None:
        if Path(target).suffix == ".array_record":
            digests = files.read_json(tmp_path / DIGESTS)
            seen.append(digests[target.name] == files.file_digest(source))
        rename(source, target)

    monkeypatch.setattr(files, "rename_synced", watch)
    save(tmp_path)
    assert seen == [True, True]


def test_classes_are_those_of_the_encoded_images(tmp_path: Path) -> None:
    save(tmp_path)
    found = describe(CachedLatents(tmp_path))
    assert (found["names"], found["counts"]) == (DATA["names"], DATA["counts"])
    with pytest.raises(DataError, match="has 3 classes, the label table 2"):
        check_label_table(CachedLatents(tmp_path), 2)
    manifest = read_manifest(tmp_path)
    write_manifest(tmp_path, manifest | {"num_classes": 2})
    with pytest.raises(DataError, match="record [25] .* has label 2, which is not in 0 to 1"):
        next(make_batches(CachedLatents(tmp_path), 0, 6))
    del manifest["data"]
    write_manifest(tmp_path, manifest)
    assert describe(CachedLatents(tmp_path))["names"] == []


@pytest.mark.parametrize(
    "values",
    [
        {"shards": 2**63},
        {"shards": -1},
        {"records": "6"},
        {"shape": [2, 3]},
        {"shape": [2**20, 2**20, 4]},
        {"dtype": "int8"},
        {"data": {"names": 3}},
    ],
)
def test_damaged_manifests_are_named(tmp_path: Path, values: dict[str, object]) -> None:
    save(tmp_path)
    write_manifest(tmp_path, read_manifest(tmp_path) | values)
    with pytest.raises(DataError, match=f"latents.json is damaged: {next(iter(values))}"):
        CachedLatents(tmp_path)


def test_a_manifest_that_is_no_json_is_named(tmp_path: Path) -> None:
    for content in (b"", b"[]", b"\xff", b"[" * 10**5):
        (tmp_path / "latents.json").write_bytes(content)
        with pytest.raises(DataError, match="latents.json is damaged"):
            CachedLatents(tmp_path)
