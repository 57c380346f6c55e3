"""Latents that an encoder made once, packed into ArrayRecord files and read instead of images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grain
import ml_dtypes
import numpy as np

from dsr_jax.core.errors import DataError
from dsr_jax.core.files import read_json, write_json
from dsr_jax.data.base import Record
from dsr_jax.data.records import write_records

MANIFEST = "latents.json"
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
      manifest: What was cached, and how.

    Raises:
      DataError: If the folder holds no cache, or one that is not complete.
    """

    def __init__(self, root: str | Path) -> None:
        self.manifest = read_manifest(root)
        files = [shard_path(root, i, self.manifest["shards"]) for i in self._shards()]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise DataError(
                f"{root} lacks {len(missing)} of {len(files)} shards, the first {missing[0]}",
                "run the same python -m dsr_jax.encode cache again: it makes what is missing",
            )
        self._records = grain.sources.ArrayRecordDataSource([str(path) for path in files])
        if len(self._records) != self.manifest["records"]:
            raise DataError(
                f"{root} holds {len(self._records)} latents, its {MANIFEST} says "
                f"{self.manifest['records']}",
                "delete the folder and cache again",
            )
        self._dtype = DTYPES[self.manifest["dtype"]]
        self.name = f"latents {root}"
        self.num_classes = int(self.manifest["num_classes"])
        self.image_shape: tuple[int, int, int] = tuple(self.manifest["shape"])

    def _shards(self) -> range:
        return range(self.manifest["shards"])

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
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"record {index} of {self.name} is damaged: {error}",
                "delete its shard and run the same python -m dsr_jax.encode cache again",
            ) from error


def read_manifest(root: str | Path) -> dict[str, Any]:
    """Reads what a cache holds.

    Raises:
      DataError: If the folder holds none.
    """
    path = Path(root) / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{root} holds no latents: {path} is missing",
            "make them: python -m dsr_jax.encode cache",
        )
    return read_json(path)


def write_manifest(root: str | Path, manifest: dict[str, Any]) -> None:
    """Writes what a cache is to hold; `records` and `shards` count the complete one."""
    write_json(Path(root) / MANIFEST, manifest)


def shard_path(root: str | Path, shard: int, shards: int) -> Path:
    """The file of one shard."""
    return Path(root) / f"latents-{shard:05d}-of-{shards:05d}.array_record"


def write_shard(path: Path, latents: Iterable[tuple[np.ndarray, int]], dtype: str) -> None:
    """Writes one shard, which appears under its name only when it is whole.

    Args:
      path: From `shard_path`.
      latents: Latent [h, w, C] and label of each record.
      dtype: A name in DTYPES.

    Raises:
      DataError: If a value is no number, or too large for the dtype.
    """
    write_records(path, (_pack(latent, label, dtype) for latent, label in latents))


def _pack(latent: np.ndarray, label: int, dtype: str) -> bytes:
    import msgpack

    with np.errstate(over="ignore"):
        stored = np.asarray(latent).astype(DTYPES[dtype])
    if not np.isfinite(stored.astype(np.float32)).all():
        raise DataError(
            f"a latent with the label {label} has values that {dtype} does not hold",
            "use --dtype=bfloat16; if they are no numbers, look at the encoder's weights",
        )
    return msgpack.packb({"latent": stored.tobytes(), "label": int(label)})
