"""Maps a function over images in batches, sharded over the mesh, with progress."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from dsr_jax.core.typing import Array, Params, PyTree
from dsr_jax.parallel.axes import make_rules
from dsr_jax.parallel.shardings import (
    batch_sharding,
    check_row_order,
    fetch,
    host_to_global,
    process_rows,
    replicated,
)

REPORT_SECONDS = 10.0
_READERS = 8


class Images(Protocol):
    """Normalized images by index: float32 [H, W, 3], the same in every process."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...


class NormalizedImages:
    """Records with a uint8 "image", scaled and shifted as an encoder expects.

    Args:
      source: Records by index.
      mean: Mean of each channel, for values in [0, 1].
      std: Standard deviation of each channel.
    """

    def __init__(self, source: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self._source = source
        self._mean, self._std = (np.asarray(x, np.float32) for x in (mean, std))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> np.ndarray:
        image = self._source[index]["image"]
        return (image.astype(np.float32) / np.float32(255) - self._mean) / self._std


class ImageStream:
    """All images in order, `batch` at a time over all devices.

    Args:
      images: The images.
      batch: Images at a time; rounded up to a multiple of the devices that split a batch.
      mesh: Devices; the batch is split over all of its axes.
      log: Called with lines about progress.
    """

    def __init__(
        self, images: Images, batch: int, mesh: Mesh, log: Callable[[str], None] = print
    ) -> None:
        self.images = images
        self.batch = -(-min(batch, len(images)) // mesh.size) * mesh.size
        self._sharding = batch_sharding(mesh, make_rules("replicated"))
        self._rows = process_rows(self._sharding, self.batch)
        self._replicated = replicated(mesh)
        self._log = log if jax.process_index() == 0 else _silent

    def place(self, tree: PyTree) -> PyTree:
        """Copies arrays to every device."""
        return jax.device_put(tree, self._replicated)

    def map(
        self, function: Callable[[Params, Array], PyTree], params: Params, what: str
    ) -> Iterator[PyTree]:
        """Yields `function(params, pixels [B, H, W, 3])` of each batch, as NumPy arrays.

        Rows that only pad the last batch are removed. The next batch is read meanwhile; its
        computation starts once the results of the last one were consumed.

        Args:
          function: Compiled; every output has the batch in front.
          params: Placed arrays.
          what: Name of the pass in lines about progress.
        """
        total, start, reported = len(self.images), monotonic(), monotonic()
        with ThreadPoolExecutor(_READERS) as pool:
            pending = self._read(pool, 0)
            for first in range(0, total, self.batch):
                pixels = np.stack([future.result() for future in pending])
                pending = self._read(pool, first + self.batch)
                given = {"pixels": pixels, "index": (first + self._rows).astype(np.int32)}
                placed = host_to_global(given, self._sharding, self.batch)
                outputs = fetch(function(params, placed["pixels"]))
                check_row_order(fetch(placed["index"]), first + np.arange(self.batch), what)
                done = min(first + self.batch, total)
                yield jax.tree.map(lambda rows, n=done - first: rows[:n], outputs)
                if monotonic() - reported > REPORT_SECONDS or done == total:
                    reported = monotonic()
                    rate = done / max(reported - start, 1e-9)
                    self._log(f"{what}: {done} of {total} images, {rate:.3g} images/s")

    def _read(self, pool: ThreadPoolExecutor, first: int) -> list[Any]:
        """Starts reading this process's rows of the batch that begins at image `first`."""
        if first >= len(self.images):
            return []
        # The last batch is padded by repetition, so that all batches have one shape.
        rows = (first + self._rows) % len(self.images)
        return [pool.submit(self.images.__getitem__, int(row)) for row in rows]


def _silent(line: str) -> None:
    del line
