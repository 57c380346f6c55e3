"""Latents of an encoder in ArrayRecord files, which training reads in place of images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsr_jax.core.errors import DamagedFileError, DataError, DsrError
from dsr_jax.core.files import file_digest, read_json, write_json
from dsr_jax.core.images import MAX_PIXELS
from dsr_jax.data.base import Record
from dsr_jax.data.classes import fingerprint, is_description
from dsr_jax.data.records import RECORD_ERRORS, open_records, write_records

MANIFEST = "latents.json"
DIGESTS = "digests.json"
MAX_SHARDS = 100_000
DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


class CachedLatents:
    """Latents and labels from a folder that `python -m dsr_jax.encode cache` wrote.

    A copy of an image counts as a record of its own, so that an epoch is all copies of all images.

    Args:
      root: The folder.

    Attributes:
      manifest: Description of the cached data and its settings.

    Raises:
      DataError: If the folder holds no cache, or one that is not complete.
    """

    def __init__(self, root: str | Path) -> None:
        self.manifest = read_manifest(root)
        shards = self.manifest["shards"]
        files = [shard_path(root, i, shards) for i in range(shards)]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise DataError(
                f"{root} lacks {len(missing)} of {len(files)} shards, the first {missing[0]}",
                "run the same python -m dsr_jax.encode cache again: it makes what is missing",
            )
        self._records = open_records(files)
        if len(self._records) != self.manifest["records"]:
            raise DataError(
                f"{root} holds {len(self._records)} latents, but {MANIFEST} records "
                f"{self.manifest['records']}",
                "delete the folder and cache again",
            )
        self._dtype = DTYPES[self.manifest["dtype"]]
        self.name = f"latents {root}"
        self.num_classes = int(self.manifest["num_classes"])
        self.image_shape: tuple[int, int, int] = tuple(self.manifest["shape"])
        # Caches of older versions do not name their classes.
        data = self.manifest.get("data") or {}
        self.class_names, self.class_counts = data.get("names", []), data.get("counts", [])
        self.fingerprint = fingerprint([str(data.get("fingerprint", "")), str(len(self._records))])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        """Reads one latent [h, w, C] in the dtype of the cache, under the key "image".

        Raises:
          DataError: If the record is damaged.
        """
        import msgpack

        try:
            record = msgpack.unpackb(self._records[index])
            latent = np.frombuffer(record["latent"], self._dtype).reshape(self.image_shape)
            return {"image": latent, "label": np.int32(record["label"])}
        except (*RECORD_ERRORS, msgpack.UnpackException) as error:
            raise DataError(
                f"record {index} of {self.name} is damaged: {error}",
                "delete its shard and run the same python -m dsr_jax.encode cache again",
            ) from error


def read_manifest(root: str | Path) -> dict[str, Any]:
    """Reads what a cache holds.

    Raises:
      DataError: If the folder holds none, or the manifest is damaged.
    """
    path = Path(root) / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{root} holds no latents: {path} is missing",
            "make them: python -m dsr_jax.encode cache",
        )
    try:
        manifest = read_json(path)
        problem = _problem_of(manifest)
    except (OSError, ValueError, RecursionError, DsrError) as error:
        problem = str(error)
    if problem:
        raise DataError(f"{path} is damaged: {problem}", "delete the folder and cache again")
    return manifest


def _problem_of(manifest: Any) -> str:
    """Returns a manifest's problem; "" if it is valid."""
    if not isinstance(manifest, dict):
        return "it holds no keys"
    limits = {"shards": MAX_SHARDS, "records": 2**40, "num_classes": 2**31}
    for key, limit in limits.items():
        value = manifest.get(key)
        if type(value) is not int or not 0 < value <= limit:
            return f"{key} is {value!r}, not a number from 1 to {limit}"
    shape = manifest.get("shape")
    if not isinstance(shape, list) or [type(side) for side in shape] != [int] * 3:
        return f"shape is {shape!r}, not three numbers"
    if not 0 < math.prod(shape) <= MAX_PIXELS or min(shape) < 1:
        return f"shape is {shape!r}"
    dtype = manifest.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"dtype is {dtype!r}, not one of {', '.join(DTYPES)}"
    data = manifest.get("data")
    return "" if data is None or is_description(data) else "data does not name classes"


def write_manifest(root: str | Path, manifest: dict[str, Any]) -> None:
    """Writes what a cache is to hold; `records` and `shards` count the complete one."""
    write_json(Path(root) / MANIFEST, manifest)


def shard_path(root: str | Path, shard: int, shards: int) -> Path:
    """Returns the path of one shard."""
    return Path(root) / f"latents-{shard:05d}-of-{shards:05d}.array_record"


def write_shard(
    root: str | Path, shard: int, shards: int, latents: Iterable[tuple[np.ndarray, int]], dtype: str
) -> None:
    """Writes one shard, which appears under its name only when it is whole, and its digest.

    Args:
      root: Folder of the cache.
      shard: Number of the shard, from 0.
      shards: Number of all shards.
      latents: Latent [h, w, C] and label of each record.
      dtype: A name in DTYPES.

    Raises:
      DataError: If a value is no number, or too large for the dtype.
      StorageError: If the shard cannot be written.
    """
    path = shard_path(root, shard, shards)

    def record_digest(whole: Path) -> None:
        write_json(Path(root) / DIGESTS, {**_read_digests(root), path.name: file_digest(whole)})

    # The digest first: ArrayRecord's checksums do not cover the padding of a shard without one.
    write_records(path, (_pack(latent, label, dtype) for latent, label in latents), record_digest)


def remove_damaged(root: str | Path, sizes: Sequence[int]) -> list[Path]:
    """Removes the shards that are not as they were written, so that they are made again.

    A shard without a digest, as of an earlier version, is read from end to end instead, which
    verifies the checksums that ArrayRecord keeps, and then gets its digest.

    Args:
      root: Folder of the cache.
      sizes: Number of records of each shard.

    Returns:
      The paths of the removed files.
    """
    digests, removed = _read_digests(root), []
    before = dict(digests)
    for shard, size in enumerate(sizes):
        path = shard_path(root, shard, len(sizes))
        if not path.exists():
            continue
        digest = file_digest(path)
        if path.name in digests:
            intact = digest == digests[path.name]
        else:
            intact = _is_readable(path, size)
        if intact:
            digests[path.name] = digest
        else:
            digests.pop(path.name, None)
            path.unlink()
            removed.append(path)
    if digests != before:
        write_json(Path(root) / DIGESTS, digests)
    return removed


def _read_digests(root: str | Path) -> dict[str, Any]:
    """Reads the shards' digests by name; {} if there are none, or the file is damaged."""
    try:
        found = read_json(Path(root) / DIGESTS)
    except (FileNotFoundError, DamagedFileError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_readable(path: Path, size: int) -> bool:
    """Whether an ArrayRecord file has `size` records, all with the checksums they were written."""
    try:
        records = open_records([path])
        for index in range(len(records)):
            records[index]
    except (DataError, *RECORD_ERRORS):
        return False
    return len(records) == size


def _pack(latent: np.ndarray, label: int, dtype: str) -> bytes:
    import msgpack

    with np.errstate(over="ignore"):
        stored = np.asarray(latent).astype(DTYPES[dtype])
    if not np.isfinite(stored.astype(np.float32)).all():
        raise DataError(
            f"a latent with the label {label} has values that {dtype} does not hold",
            "use --dtype=bfloat16; if they are not finite, check the encoder's weights",
        )
    return msgpack.packb({"latent": stored.tobytes(), "label": int(label)})
