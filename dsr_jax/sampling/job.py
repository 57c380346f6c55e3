"""Resumable sampling jobs: images by global index into parts, parts into one `.npz`.

What makes image i is the recipe and i; nothing depends on which batch, device or host draws it. A
part is a file named by the range of indices it holds and written atomically, so what is missing
after a kill is read off the folder, and any batch size or number of hosts can finish the job.
"""

import datetime
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsr_jax.core.errors import CheckpointError, DsrError, NumericsError
from dsr_jax.core.files import file_digest, open_atomic, read_json, write_json
from dsr_jax.core.provenance import provenance
from dsr_jax.core.typing import Array
from dsr_jax.parallel.processes import is_process_zero, wait_for_all
from dsr_jax.parallel.shardings import check_row_order, fetch
from dsr_jax.sampling.npz import write_npz


class Samples(NamedTuple):
    """A batch of images, with what the job checks before it writes them.

    Attributes:
      images: [B, H, W, C] uint8.
      finite: [B] bool, whether each was finite before the cast.
      indices: [B] uint32, the global index that each was made from; it went through the same
        program, so that an image is never stored under another's index.
    """

    images: Array
    finite: Array
    indices: Array


Draw = Callable[[np.ndarray, np.ndarray], Samples]
"""`(global indices [B], labels [B]) -> Samples`; the same arrays on every host."""


@dataclass(frozen=True)
class SampleJob:
    """One file of samples: `<folder>/<name>.npz` and `.json`, parts in `<name>.parts/` until then.

    On several hosts every process runs the same job and `folder` lies on storage that all of them
    see: each writes the rows that its devices hold, the primary process assembles.

    Attributes:
      folder: Where the files go.
      name: Their common name.
      labels: Class of every sample [N], int32, by global index.
      image_shape: Height, width and channels.
      recipe: What decides the images, as JSON values (checkpoint, EMA, sampler, seed, ...). A job
        resumes only under an equal recipe. What does not decide them (batch, devices, revision)
        is recorded for every start instead.
    """

    folder: Path
    name: str
    labels: np.ndarray
    image_shape: tuple[int, ...]
    recipe: Mapping[str, Any]

    @property
    def npz_path(self) -> Path:
        """The samples, once complete."""
        return self.folder / f"{self.name}.npz"

    @property
    def json_path(self) -> Path:
        """The recipe beside them."""
        return self.folder / f"{self.name}.json"

    @property
    def parts(self) -> Path:
        """The folder of an unfinished job."""
        return self.folder / f"{self.name}.parts"

    def run(self, draw: Draw, batch: int, report: Callable[[str], None] = print) -> Path:
        """Draws what is missing and assembles the file.

        Args:
          draw: Draws one batch of exactly `batch` samples.
          batch: Samples at a time over all devices; it does not change which image is whose.
          report: Takes lines about progress, on the primary process.

        Returns:
          The path of the `.npz`.

        Raises:
          CheckpointError: If the folder holds a job of another recipe, or a damaged part.
          NumericsError: If an image is not finite.
          MeshError: If images come back in another order than their indices.
        """
        total = len(self.labels)
        log = report if is_process_zero() else _silent
        missing = np.flatnonzero(_by_primary(lambda: self._plan(batch), np.zeros(total, bool)))
        if len(missing) < total:
            log(f"{self.name}: {total - len(missing)} of {total} images are there already")
        progress = _Progress(total, total - len(missing), log)
        for start in range(0, len(missing), batch):
            rows = missing[start : start + batch].astype(np.uint32)
            # The last batch is filled up by repetition, so that one program serves all of them.
            indices = np.resize(rows, batch)
            self._write(draw(indices, self.labels[indices]), indices, len(rows))
            progress.add(len(rows))
        wait_for_all(f"{self.name} drawn")
        _by_primary(self._assemble, np.zeros(0, bool))
        log(f"samples: {self.npz_path}")
        return self.npz_path

    def _plan(self, batch: int) -> np.ndarray:
        """Looks at what is there and returns which images are missing [N]."""
        if self._finished():
            return np.zeros(len(self.labels), bool)
        self._start(batch)
        missing = np.ones(len(self.labels), bool)
        for first, end, path in self._part_files():
            self._load_part(first, end, path)
            missing[first:end] = False
        return missing

    def _identity(self) -> dict[str, Any]:
        """The recipe with what the job adds to it, as JSON reads it back."""
        labels = np.ascontiguousarray(self.labels, "<i4")
        own = {
            "num_samples": len(labels),
            "image_shape": self.image_shape,
            "labels_digest": "sha256:" + hashlib.sha256(labels.data).hexdigest(),
        }
        return json.loads(json.dumps({**self.recipe, **own}))

    def _finished(self) -> bool:
        """Whether the `.json`, which is written last, is there and of this recipe."""
        if self.json_path.is_file():
            self._compare(read_json(self.json_path), self.json_path)
            return self.npz_path.is_file()
        if self.npz_path.exists() and not self.parts.exists():
            raise CheckpointError(
                f"{self.npz_path} exists, but neither its recipe {self.json_path.name} nor its "
                "parts: what it holds is unknown",
                "move it away, or choose another name or folder",
            )
        return False

    def _compare(self, record: Mapping[str, Any], path: Path) -> None:
        """Raises unless the recorded recipe is this job's."""
        old, new = record.get("recipe", {}), self._identity()
        differing = [
            f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        if differing:
            raise CheckpointError(
                f"{path} records another recipe:\n    " + "\n    ".join(differing),
                "choose another --out or --name, go back to those settings, or delete the old job",
            )

    def _start(self, batch: int) -> None:
        """Creates the folder of parts, or checks that it belongs to this recipe."""
        self.json_path.unlink(missing_ok=True)  # Left over where somebody deleted the .npz.
        record_path = self.parts / "job.json"
        start = {**provenance(), "batch": batch}
        if record_path.is_file():
            record = read_json(record_path)
            self._compare(record, record_path)
            write_json(record_path, {**record, "starts": [*record["starts"], start]})
        else:
            write_json(record_path, {"recipe": self._identity(), "starts": [start]})

    def _part_files(self) -> list[tuple[int, int, Path]]:
        """Lists (first index, end, path) of the parts, sorted."""
        found = []
        for path in self.parts.glob("*.npy"):
            if match := re.fullmatch(r"(\d{8,})-(\d{8,})\.npy", path.name):
                found.append((int(match[1]), int(match[2]), path))
        return sorted(found)

    def _load_part(self, first: int, end: int, path: Path) -> np.ndarray:
        """Maps one part into memory.

        Raises:
          CheckpointError: If the file is damaged.
        """
        want = (end - first, *self.image_shape)
        try:
            part = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise self._damaged(path, str(error)) from error
        if part.shape != want or part.dtype != np.uint8:
            raise self._damaged(path, f"it holds {part.dtype}{part.shape}, expected uint8{want}")
        return part

    def _damaged(self, path: Path, problem: str) -> CheckpointError:
        remedy = "delete that file and run again: only its images are drawn again"
        return CheckpointError(f"part {path} is damaged: {problem}", remedy)

    def _write(self, samples: Samples, indices: np.ndarray, count: int) -> None:
        """Writes the rows that this process holds, one file per unbroken range of indices."""
        finite = fetch(samples.finite)
        if not finite.all():
            bad = indices[~finite]
            raise NumericsError(
                f"sample {int(bad[0])} is not finite ({len(bad)} of {len(indices)} in its batch)",
                "use another checkpoint, more points or less guidance; that batch was not written",
            )
        places, images = _local_rows(samples.images)
        check_row_order(_local_rows(samples.indices)[1], indices[places], self.name)
        images, held = images[places < count], indices[places[places < count]]
        breaks = np.flatnonzero(np.diff(held.astype(np.int64)) != 1) + 1
        for run, piece in zip(np.split(held, breaks), np.split(images, breaks), strict=True):
            if len(run):
                name = f"{int(run[0]):08d}-{int(run[-1]) + 1:08d}.npy"
                with open_atomic(self.parts / name) as file:
                    np.save(file, piece, allow_pickle=False)

    def _pieces(self) -> Iterator[np.ndarray]:
        """Yields all images in order; indices that two parts hold are taken once."""
        position = 0
        for first, end, path in self._part_files():
            if first > position:
                raise self._damaged(path, f"images {position} to {first - 1} are missing before it")
            if end > position:
                yield self._load_part(first, end, path)[position - first :]
                position = end

    def _assemble(self) -> np.ndarray:
        """Streams the parts into the `.npz`, writes the record beside it, removes the parts."""
        if self.parts.exists():
            if not self.json_path.is_file():
                shape = (len(self.labels), *self.image_shape)
                record = read_json(self.parts / "job.json")
                labels = self.labels.astype(np.int32)
                write_npz(self.npz_path, shape, self._pieces(), {"labels": labels})
                digest = file_digest(self.npz_path)
                write_json(self.json_path, {**record, "samples_digest": digest})
            shutil.rmtree(self.parts)
        return np.zeros(0, bool)


class _Progress:
    """Says every few seconds how far a job is and how long the rest will take."""

    def __init__(self, total: int, done: int, log: Callable[[str], None]) -> None:
        self.total, self.done, self.log = total, done, log
        self.timed = 0
        self.began = self.said = 0.0

    def add(self, count: int) -> None:
        """Counts one batch; the first one, which compiles, is left out of the rate."""
        now = monotonic()
        self.done += count
        self.timed += count if self.began else 0
        self.began = self.began or now
        if self.done < self.total and now - self.said < 5:
            return
        self.said = now
        line = f"sampled {self.done}/{self.total}"
        if self.timed and now > self.began:
            rate = self.timed / (now - self.began)
            left = datetime.timedelta(seconds=round((self.total - self.done) / rate))
            line += f", {rate:.3g} images/s, {left} left"
        self.log(line)


def _local_rows(array: Array) -> tuple[np.ndarray, np.ndarray]:
    """Returns the places [n] in the batch of the rows that this process owns, and the rows.

    Where several devices hold the same rows, the first replica's process owns them.
    """
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    shards.sort(key=lambda shard: shard.index[0].start or 0)
    if not shards:
        return np.zeros(0, int), np.zeros((0, *array.shape[1:]), array.dtype)
    places = [np.arange(array.shape[0])[shard.index[0]] for shard in shards]
    return np.concatenate(places), np.concatenate([np.asarray(shard.data) for shard in shards])


def _silent(line: str) -> None:
    del line


def _by_primary(action: Callable[[], np.ndarray], like: np.ndarray) -> np.ndarray:
    """Runs `action` on the primary process; every process returns its result, or raises.

    Hosts may see a shared folder at different moments, so the primary's view counts; and an error
    that only one process raised would leave the others waiting for it.
    """
    error, result, failed = None, like, np.zeros((), bool)
    if is_process_zero():
        try:
            result = action()
        except DsrError as caught:
            error, failed = caught, np.ones((), bool)
    if jax.process_count() > 1:
        failed, result = multihost_utils.broadcast_one_to_all((failed, result))
    if error is not None:
        raise error
    if failed:
        raise CheckpointError("the primary process stopped this job", "read its message")
    return result
