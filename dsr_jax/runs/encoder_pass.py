"""One pass of an encoder over a data set: statistics of its latents, or the latents themselves."""

import io
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsr_jax import build
from dsr_jax.build.rae import encoding_recipe
from dsr_jax.config import ConfigDict, precision_recipe
from dsr_jax.convert.statistics import FILE, load_statistics, save_statistics
from dsr_jax.core.arrays import read_arrays
from dsr_jax.core.errors import ConfigError, DsrError
from dsr_jax.core.files import (
    file_digest,
    leftovers,
    read_json,
    remove_leftovers,
    write_atomic,
    write_json,
)
from dsr_jax.core.lock import is_lock
from dsr_jax.core.provenance import provenance
from dsr_jax.core.typing import Batch
from dsr_jax.data import latents as cache
from dsr_jax.data.classes import compare, describe
from dsr_jax.parallel import shardings
from dsr_jax.parallel.processes import is_process_zero, log, wait_for_all
from dsr_jax.spaces.statistics import LatentStatistics
from dsr_jax.telemetry.clock import StepClock
from dsr_jax.telemetry.progress import Progress

_PROGRESS, _RECORD = "progress.npz", "statistics.json"


class EncoderPass:
    """Pass of a config's encoder over its data, batch by batch in the order of training.

    Args:
      config: Data and space.
      images: Number of images to encode; 0 for each image once.

    Attributes:
      latent_shape: Height, width and channels.
      num_classes: Labels are in [0, num_classes).
      count: Images to encode.
      batch: Images at a time.
      steps: Batches in all; what the last holds beyond `count` belongs to the next epoch.
      recipe: All settings that determine the latents, as JSON values.
      data: Classes and fingerprint of the images.
    """

    def __init__(self, config: ConfigDict, images: int = 0) -> None:
        mesh, rules = build.make_mesh(config), build.make_rules(config)
        self._space, self._variables = build.make_space(config, mesh)
        source = build.make_source(config)
        sharding = shardings.batch_sharding(mesh, rules)
        self._batches = build.global_batches(config, source, sharding)
        self._encode = jax.jit(
            lambda given, pixels: self._space.encode(given, pixels.astype(np.float32) / 255)
        )
        self.latent_shape, self.num_classes = self._space.latent_shape, source.num_classes
        self.count, self.batch = images or len(source), config.data.global_batch
        self.steps = -(-self.count // self.batch)
        self.recipe = _recipe(config, source.name, self.count)
        self.data = describe(source)

    def run(self, steps: range, keep: Callable[[int, np.ndarray, Batch], None]) -> float:
        """Encodes a batch per step; the host works on one while the devices encode the next.

        Args:
          steps: Numbers of the batches.
          keep: Called with the step, the global latents [B, h, w, C] and the batch.

        Returns:
          The fraction of the time after the first batch that was spent waiting for data.
        """
        if not steps:
            return 0.0
        batches = Waiting(self._batches(steps.start))
        with Progress(self.steps, start_step=steps.start) as progress:
            # The first batch waits for readers to start and for the compiler, once.
            pending = self._start(batches)
            started, begin = batches.seconds, time.monotonic()
            clock = StepClock(self.batch, self.steps)
            for step in steps:
                latents, batch = pending
                if step + 1 in steps:
                    pending = self._start(batches)
                wanted = (step * self.batch + np.arange(self.batch)) % 2**32
                shardings.check_row_order(shardings.fetch(batch["index"]), wanted, "latents")
                keep(step, shardings.fetch(latents), batch)
                progress.update(step + 1, timing=clock.lap(step + 1))
        fraction = (batches.seconds - started) / max(time.monotonic() - begin, 1e-9)
        wait = f"{fraction:.1%} of the time was waiting for data"
        log(f"first batch after {started:.1f} s; then {wait}")
        return fraction

    def _start(self, batches: Iterator[Batch]) -> tuple[Any, Batch]:
        batch = next(batches)
        return self._encode(self._variables, batch["image"]), batch


class Waiting:
    """Iterator that measures how long its caller has waited for it.

    Args:
      batches: Iterator to measure.

    Attributes:
      seconds: Time spent in `batches` so far.
    """

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        start = time.monotonic()
        try:
            return next(self._batches)
        finally:
            self.seconds += time.monotonic() - start


def take_statistics(work: EncoderPass, out: Path, save_every: int, stop_after: int = 0) -> None:
    """Computes mean and variance of the latents and writes them, with their recipe, into `out`.

    Args:
      work: Data and encoder of the pass.
      out: A new folder, or that of the same pass.
      save_every: Batches between two savings of the sums.
      stop_after: Batches after which to stop, as if interrupted; 0 for none.

    Raises:
      ConfigError: If the folder holds statistics of something else.
    """
    saved = _read_progress(out, work.recipe)
    start = int(saved["step"]) if saved else 0
    if start == work.steps and _are_written(out):
        log(f"complete: {out / FILE}")
        return
    statistics = LatentStatistics(work.latent_shape)
    if saved:
        statistics = LatentStatistics.from_state(saved, work.latent_shape)
    stop = min(work.steps, start + stop_after if stop_after else work.steps)

    def keep(step: int, latents: np.ndarray, batch: Batch) -> None:
        statistics.update(latents[: work.count - step * work.batch])
        if (step + 1) % save_every == 0 or step + 1 == stop:
            _save(out, work.recipe, statistics, step + 1)

    waiting = work.run(range(start, stop), keep)
    log(f"{statistics.count} images")
    if stop == work.steps and is_process_zero():
        save_statistics(out / FILE, statistics.finish())
        details = {
            "images": statistics.count,
            "data_wait_share": round(waiting, 4),
            "digest": file_digest(out / FILE),
        }
        write_json(out / _RECORD, {"recipe": work.recipe, **details, "provenance": provenance()})
        log(f"statistics: {out / FILE}; use them with --config.space.statistics={out}")


def cache_latents(
    work: EncoderPass, out: Path, dtype: str, copies: int, shard_steps: int, stop_after: int = 0
) -> None:
    """Packs the latents of an encoder into ArrayRecord shards, from which training can read.

    Copy c of an image is mirrored or not as in epoch c of training. A shard is written whole or not
    at all, so that the same call continues what was stopped, and makes damaged shards again.

    Args:
      work: Data and encoder of the pass: `copies` times the data set.
      out: A new folder, or that of the same pass.
      dtype: Stored dtype, a name in `data.latents.DTYPES`.
      copies: Only recorded.
      shard_steps: Batches per shard.
      stop_after: Shards after which to stop, as if interrupted; 0 for none.

    Raises:
      ConfigError: If the folder holds something else.
    """
    shards = -(-work.steps // shard_steps)
    manifest = {
        "shape": work.latent_shape,
        "dtype": dtype,
        "copies": copies,
        "records": work.count,
        "shards": shards,
        "shard_steps": shard_steps,
        "num_classes": work.num_classes,
        "recipe": work.recipe,
        "data": work.data,
    }
    _check_cache(out, json.loads(json.dumps(manifest)))
    wait_for_all("latents checked")
    if is_process_zero() and not (out / cache.MANIFEST).exists():
        out.mkdir(parents=True, exist_ok=True)
        cache.write_manifest(out, {**manifest, "provenance": provenance()})
    if is_process_zero():
        remove_leftovers(out)
        for path in cache.remove_damaged(out, _shard_sizes(work, shard_steps)):
            log(f"{path} is damaged; it is made again")
    wait_for_all("latents verified")
    missing = [i for i in range(shards) if not cache.shard_path(out, i, shards).exists()]
    wait_for_all("latents listed")
    for first, end in _stretches(missing[: stop_after or None]):
        steps = range(first * shard_steps, min(end * shard_steps, work.steps))
        work.run(steps, _ShardWriter(work, out, manifest))
    if not missing[stop_after or shards :]:
        log(f"latents: {out}; train on them with --config.data.latents={out}")


def _are_written(out: Path) -> bool:
    """Whether the statistics are there as they were written, by the digest in their record."""
    try:
        digest = read_json(out / _RECORD).get("digest")
        # Earlier versions recorded none.
        found = file_digest(out / FILE) if digest else load_statistics(out)
    except FileNotFoundError:
        return False
    except (DsrError, AttributeError) as error:
        log(f"{out / FILE} is damaged ({error}); it is made again")
        return False
    if digest and found != digest:
        log(f"{out / FILE} is damaged: it is not what was written; it is made again")
    return not digest or found == digest


def _shard_sizes(work: EncoderPass, shard_steps: int) -> list[int]:
    """Returns the number of latents in each shard."""
    size = shard_steps * work.batch
    return [min(size, work.count - first) for first in range(0, work.count, size)]


def _stretches(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Splits sorted numbers into ranges without gaps, each (first, last + 1)."""
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in group]
        yield members[0], members[-1] + 1


class _ShardWriter:
    """Collects batches; process 0 writes them at the end of each shard."""

    def __init__(self, work: EncoderPass, out: Path, manifest: dict[str, Any]) -> None:
        self._work, self._out, self._manifest = work, out, manifest
        self._rows: list[tuple[np.ndarray, int]] = []

    def __call__(self, step: int, latents: np.ndarray, batch: Batch) -> None:
        """Adds one batch."""
        dtype, shard_steps = self._manifest["dtype"], self._manifest["shard_steps"]
        stored = latents.astype(cache.DTYPES[dtype])
        pairs = list(zip(stored, shardings.fetch(batch["label"]), strict=True))
        self._rows += pairs[: self._work.count - step * self._work.batch]
        if (step + 1) % shard_steps and step + 1 != self._work.steps:
            return
        if is_process_zero():
            cache.write_shard(
                self._out, step // shard_steps, self._manifest["shards"], self._rows, dtype
            )
        self._rows.clear()


def _check_cache(out: Path, manifest: dict[str, Any]) -> None:
    """Checks that `out` is empty or holds a cache with this manifest."""
    path = out / cache.MANIFEST
    if path.exists():
        found = cache.read_manifest(out)
        found.pop("provenance", None)
        data = manifest.pop("data")
        changes = compare(found.pop("data", data), data)
        if changes:
            raise ConfigError(
                f"{out} was made from other data:\n    " + "\n    ".join(changes[:8]),
                "name another --out, or restore the data",
            )
        settings = {key: value for key, value in manifest.items() if key != "recipe"}
        others = {key: value for key, value in found.items() if key != "recipe"}
        _refuse_others(
            out, {**found["recipe"], "cache": others}, {**manifest["recipe"], "cache": settings}
        )
    else:
        _refuse_foreign(out)


def _refuse_foreign(out: Path) -> None:
    """Checks that `out` is new, empty or left by a pass that was killed before its first save."""
    if not out.exists():
        return
    if not out.is_dir() or any(
        not is_lock(path.name) for path in {*out.iterdir()} - {*leftovers(out)}
    ):
        raise ConfigError(f"{out} holds other files", "name a new folder; nothing was written")


def _refuse_others(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if found == wanted:
        return
    differing = [
        f"{section}.{key}: {found[section].get(key)} -> {value}"
        for section, values in wanted.items()
        for key, value in values.items()
        if found[section].get(key) != value
    ]
    raise ConfigError(
        f"{out} was made with other settings:\n    " + "\n    ".join(differing[:8]),
        "name another --out, or use the settings that it was started with",
    )


def _recipe(config: ConfigDict, source: str, count: int) -> dict[str, Any]:
    """Returns all settings that determine the latents, as JSON values."""
    data = {key: config.data[key] for key in ("split", "image_size", "global_batch", "flip")}
    recipe = {
        "data": {"source": source, "images": count, "seed": config.seed, **data},
        "space": encoding_recipe(config),
        "precision": precision_recipe(config, trained=False),
    }
    return json.loads(json.dumps(recipe))


def _save(out: Path, recipe: dict[str, Any], statistics: LatentStatistics, step: int) -> None:
    """Writes the sums over the batches before `step`, on process 0."""
    if is_process_zero():
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {"recipe": json.dumps(recipe), "step": step, **statistics.state()}
        np.savez(buffer, **arrays)
        write_atomic(out / _PROGRESS, buffer.getvalue())


def _read_progress(out: Path, recipe: dict[str, Any]) -> dict[str, np.ndarray]:
    """Reads what `_save` wrote last; {} for a new pass, or if the file is damaged.

    Raises:
      ConfigError: If the folder holds something else, or a pass of other settings.
    """
    path = out / _PROGRESS
    if not path.exists():
        _refuse_foreign(out)
        return {}
    try:
        saved = read_arrays(path)
        found = json.loads(str(saved["recipe"]))
        int(saved["step"])
    except (ValueError, KeyError, TypeError) as error:
        log(f"{path} is damaged ({error}); the pass starts again")
        return {}
    _refuse_others(out, found, recipe)
    return saved
