"""Resumable sampling jobs: images by global index into parts, parts into one `.npz`.

What makes image i is the recipe and i; nothing depends on the batch, device or host that samples
it. A part is a file named by the range of indices that it holds and a checksum, and written
atomically, so what is missing after a kill is read off the folder, and any batch size or number of
hosts can finish the job. Damaged parts and files are noticed, and their images made again.
"""

import contextlib
import hashlib
import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsr_jax.core.arrays import READ_ERRORS
from dsr_jax.core.cli import leave
from dsr_jax.core.errors import CheckpointError, DamagedFileError, NumericsError
from dsr_jax.core.files import file_digest, open_atomic, read_object, remove_leftovers, write_json
from dsr_jax.core.lock import FolderLock
from dsr_jax.core.provenance import provenance
from dsr_jax.core.typing import Array
from dsr_jax.parallel.device_memory import smallest_of_processes
from dsr_jax.parallel.processes import is_process_zero, wait_for_all
from dsr_jax.parallel.shardings import check_row_order, fetch
from dsr_jax.sampling.npz import write_npz
from dsr_jax.sampling.progress import JobProgress

_PART_NAME = re.compile(r"(\d{8,})-(\d{8,})-([0-9a-f]{8})\.npy")


class _Part(NamedTuple):
    """File of images first..end-1, with the checksum in its name."""

    first: int
    end: int
    checksum: int
    path: Path


_REASON_BYTES = 600
"""Of an error on process 0, as the others show it."""


class Samples(NamedTuple):
    """Batch of images, with values that the job checks before it writes them.

    Attributes:
      images: [B, H, W, C] uint8.
      finite: [B] bool, whether each was finite before the cast.
      indices: [B] uint32, the global index that each was made from; it went through the same
        program, so that an image is never stored under another's index.
    """

    images: Array
    finite: Array
    indices: Array


SampleBatchFn = Callable[[np.ndarray, np.ndarray], Samples]
"""`(global indices [B], labels [B]) -> Samples`; the same arrays on every host."""


@dataclass(frozen=True)
class SampleJob:
    """One file of samples: `<folder>/<name>.npz` and `.json`, parts in `<name>.parts/` until then.

    On several hosts every process runs the same job and `folder` is on storage that all of them
    see: each writes the rows that its devices hold, process 0 assembles.

    Attributes:
      folder: Folder of the files.
      name: Common name of the files.
      labels: Class of every sample [N], or its token sequence [N, L], int32, by global index; in
        the `.npz` called labels or tokens.
      image_shape: Height, width and channels.
      recipe: Settings that determine the images, as JSON values (checkpoint, EMA, sampler). A job
        resumes only under an equal recipe. What does not decide them (batch, devices, revision)
        is recorded for every start instead.
      notes: Further entries of the `.json`, such as the names of their classes.
    """

    folder: Path
    name: str
    labels: np.ndarray
    image_shape: tuple[int, ...]
    recipe: Mapping[str, Any]
    notes: Mapping[str, Any] = field(default_factory=dict)

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

    def is_assembled(self) -> bool:
        """Whether all processes find the job's files, so that nothing is left to sample."""
        found = self.npz_path.is_file() and self.json_path.is_file()
        return bool(smallest_of_processes(int(found)))

    def last_batch(self) -> int | None:
        """Returns the batch of the last start of an unfinished job; None for a new one."""
        batch = 0
        if (self.parts / "job.json").is_file():
            with contextlib.suppress(DamagedFileError):
                batch = int((self._read_record()["starts"] or [{}])[-1].get("batch", 0))
        # Hosts may see a shared folder at different moments.
        return smallest_of_processes(batch) or None

    def run(self, sample: SampleBatchFn, batch: int, report: Callable[[str], None] = print) -> Path:
        """Samples what is missing and assembles the file.

        Args:
          sample: Samples one batch of exactly `batch` images.
          batch: Images at a time over all devices; it changes no image.
          report: Takes lines about progress, on process 0.

        Returns:
          The path of the `.npz`.

        Raises:
          CheckpointError: If the folder holds a job of another recipe.
          LockError: If another command makes the same files.
          NumericsError: If an image is not finite.
          MeshError: If images come back in another order than their indices.
        """
        log = report if is_process_zero() else _silent
        lock = FolderLock(self.folder, self.name, lost=leave, log=log)

        def acquire() -> np.ndarray:
            lock.acquire()
            return np.zeros(0, bool)

        try:
            _on_process_zero(acquire, np.zeros(0, bool))
            return self._run(sample, batch, log)
        finally:
            lock.release()

    def _run(self, sample: SampleBatchFn, batch: int, log: Callable[[str], None]) -> Path:
        """Runs the job while no other command makes the same files."""
        total = len(self.labels)
        missing = np.flatnonzero(
            _on_process_zero(lambda: self._plan(batch, log), np.zeros(total, bool))
        )
        if len(missing) < total:
            log(f"{self.name}: {total - len(missing)} of {total} images are there already")
        progress = JobProgress(total, total - len(missing), log)
        for start in range(0, len(missing), batch):
            rows = missing[start : start + batch].astype(np.uint32)
            # The last batch is filled up by repetition, so that one program serves all of them.
            indices = np.resize(rows, batch)
            self._write(sample(indices, self.labels[indices]), indices, len(rows))
            progress.add(len(rows))
        wait_for_all(f"{self.name} sampled")
        _on_process_zero(self._assemble, np.zeros(0, bool))
        log(f"samples: {self.npz_path}")
        return self.npz_path

    def _plan(self, batch: int, log: Callable[[str], None]) -> np.ndarray:
        """Looks at what is there and returns which images are missing [N]."""
        # Of these files alone: other jobs, whose names may begin alike, write beside them.
        for suffix in (".npz", ".json", ".png"):
            remove_leftovers(self.folder, f"{self.name}{suffix}")
        if self._finished(log):
            return np.zeros(len(self.labels), bool)
        self._start(batch, log)
        missing = np.ones(len(self.labels), bool)
        for part in self._part_files():
            try:
                self._load_part(part)
            except CheckpointError as error:
                log(f"{str(error).splitlines()[0]}; its images are made again")
                part.path.unlink()
                continue
            missing[part.first : part.end] = False
        return missing

    def _identity(self) -> dict[str, Any]:
        """Returns the recipe with the job's own settings, in the form read back from JSON."""
        labels = np.ascontiguousarray(self.labels, "<i4")
        own = {
            "num_samples": len(labels),
            "image_shape": self.image_shape,
            "labels_digest": "sha256:" + hashlib.sha256(labels.data).hexdigest(),
        }
        return json.loads(json.dumps({**self.recipe, **own}))

    def _finished(self, log: Callable[[str], None]) -> bool:
        """Whether the `.json`, which is written last, is there, of this recipe and file."""
        if self.json_path.is_file():
            remedy = f"remove it and {self.npz_path.name}: both are made again"
            record = read_object(self.json_path, remedy)
            self._compare(record, self.json_path)
            if not self.npz_path.is_file():
                return False
            if file_digest(self.npz_path) == record.get("samples_digest"):
                return True
            log(f"{self.npz_path} is damaged: it is not what was written; it is made again")
            self.npz_path.unlink()
            return False
        if self.npz_path.exists() and not self.parts.exists():
            raise CheckpointError(
                f"{self.npz_path} exists, but neither its recipe {self.json_path.name} nor its "
                "parts: its content is unknown",
                "move it away, or choose another name or folder",
            )
        return False

    def _compare(self, record: Mapping[str, Any], path: Path) -> None:
        """Raises unless the recorded recipe is this job's."""
        old, new = record.get("recipe", {}), self._identity()
        if not isinstance(old, dict):
            raise DamagedFileError(f"{path} is damaged: it holds no recipe", f"remove {path}")
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

    def _start(self, batch: int, log: Callable[[str], None]) -> None:
        """Creates the folder of parts, or checks that it belongs to this recipe."""
        self.json_path.unlink(missing_ok=True)  # Left over where somebody deleted the .npz.
        record_path = self.parts / "job.json"
        try:
            if record_path.is_file():
                self._read_record()
        except DamagedFileError as error:
            log(f"{error.problem}; what it belongs to is unknown, and all images are made again")
            shutil.rmtree(self.parts)
        start = {**provenance(), "batch": batch}
        if record_path.is_file():
            record = self._read_record()
            self._compare(record, record_path)
            write_json(record_path, {**record, "starts": [*record["starts"], start]})
        else:
            write_json(record_path, {"recipe": self._identity(), "starts": [start]})

    def _read_record(self) -> dict[str, Any]:
        """Reads the recipe and starts of an unfinished job.

        Raises:
          DamagedFileError: If that is not what the file holds.
        """
        path = self.parts / "job.json"
        remedy = "run the same command again: its images are made again"
        record = read_object(path, remedy)
        if not isinstance(record.get("starts"), list):
            raise DamagedFileError(f"{path} is damaged: it holds no starts", remedy)
        return record

    def _part_files(self) -> list[_Part]:
        """Lists the parts, sorted by their first index."""
        found = []
        for path in self.parts.glob("*.npy"):
            if match := _PART_NAME.fullmatch(path.name):
                found.append(_Part(int(match[1]), int(match[2]), int(match[3], 16), path))
        return sorted(found)

    def _load_part(self, part: _Part) -> np.ndarray:
        """Maps one part into memory.

        Raises:
          CheckpointError: If the file is damaged.
        """
        want = (part.end - part.first, *self.image_shape)
        try:
            images = np.lib.format.open_memmap(part.path, mode="r")
        except READ_ERRORS as error:
            raise _damaged(part.path, str(error)) from error
        if images.shape != want or images.dtype != np.uint8:
            found = f"{images.dtype}{images.shape}"
            raise _damaged(part.path, f"it holds {found}, expected uint8{want}")
        if _checksum(images) != part.checksum:
            raise _damaged(part.path, "its checksum does not agree")
        return images

    def _write(self, samples: Samples, indices: np.ndarray, count: int) -> None:
        """Writes the rows that this process holds, one file per unbroken range of indices."""
        finite = fetch(samples.finite)
        if not finite.all():
            bad = indices[~finite]
            raise NumericsError(
                f"sample {int(bad[0])} is not finite ({len(bad)} of {len(indices)} in its batch)",
                "use another checkpoint, more points or less guidance; that batch was not written",
            )
        rows, images = _local_rows(samples.images)
        check_row_order(_local_rows(samples.indices)[1], indices[rows], self.name)
        images, held = images[rows < count], indices[rows[rows < count]]
        breaks = np.flatnonzero(np.diff(held.astype(np.int64)) != 1) + 1
        for run, piece in zip(np.split(held, breaks), np.split(images, breaks), strict=True):
            if len(run):
                ends = f"{int(run[0]):08d}-{int(run[-1]) + 1:08d}"
                name = f"{ends}-{_checksum(piece):08x}.npy"
                with open_atomic(self.parts / name) as file:
                    np.save(file, piece, allow_pickle=False)

    def _pieces(self) -> Iterator[np.ndarray]:
        """Yields all images in order; indices that two parts hold are taken once."""
        position = 0
        for part in self._part_files():
            if part.first > position:
                gap = f"images {position} to {part.first - 1} are missing before it"
                raise _damaged(part.path, gap)
            if part.end > position:
                yield self._load_part(part)[position - part.first :]
                position = part.end

    def _assemble(self) -> np.ndarray:
        """Streams the parts into the `.npz`, writes the record beside it, removes the parts."""
        if self.parts.exists():
            if not self.json_path.is_file():
                shape = (len(self.labels), *self.image_shape)
                record = self._read_record()
                labels = self.labels.astype(np.int32)
                name = "labels" if labels.ndim == 1 else "tokens"
                write_npz(self.npz_path, shape, self._pieces(), {name: labels})
                digest = file_digest(self.npz_path)
                done = {**self.notes, **record, "samples_digest": digest}
                write_json(self.json_path, done)
            shutil.rmtree(self.parts)
        return np.zeros(0, bool)


def _local_rows(array: Array) -> tuple[np.ndarray, np.ndarray]:
    """Returns the row numbers [n] in the batch that this process owns, and the rows.

    Where several devices hold the same rows, the first replica's process owns them.
    """
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    shards.sort(key=lambda shard: shard.index[0].start or 0)
    if not shards:
        return np.zeros(0, int), np.zeros((0, *array.shape[1:]), array.dtype)
    numbers = [np.arange(array.shape[0])[shard.index[0]] for shard in shards]
    return np.concatenate(numbers), np.concatenate([np.asarray(shard.data) for shard in shards])


def _checksum(images: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(images).data)


def _damaged(path: Path, problem: str) -> CheckpointError:
    remedy = "run the same command again: its images are made again"
    return CheckpointError(f"part {path} is damaged: {problem}", remedy)


def _silent(line: str) -> None:
    del line


def _on_process_zero(action: Callable[[], np.ndarray], like: np.ndarray) -> np.ndarray:
    """Runs `action` on process 0; every process returns its result, or raises.

    Hosts may see a shared folder at different moments, so the view of process 0 counts; and an
    error that it alone raised would leave the others waiting for it.
    """
    if jax.process_count() == 1:
        return action()
    error, result = None, like
    reason = np.zeros(_REASON_BYTES, np.uint8)
    if is_process_zero():
        try:
            result = action()
        except Exception as caught:
            error = caught
            text = f"{type(caught).__name__}: {caught}".encode()[:_REASON_BYTES]
            reason[: len(text)] = np.frombuffer(text, np.uint8)
    reason, result = multihost_utils.broadcast_one_to_all((reason, result))
    if error is not None:
        raise error
    if reason.any():
        cause = np.asarray(reason, np.uint8).tobytes().rstrip(b"\0").decode(errors="replace")
        raise CheckpointError(
            f"process 0 stopped this job: {cause}", "check the output of process 0"
        )
    return result
