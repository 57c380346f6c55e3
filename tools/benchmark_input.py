"""Image input for `tools/benchmark.py`: Grain's pipeline and torch's DataLoader."""

import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsr_jax.core.errors import NumericsError
from dsr_jax.data.base import Source
from dsr_jax.data.pipeline import make_batches
from dsr_jax.data.sources import make_source
from tools import prepare_imagenet
from tools.benchmark_sides import DIFFERENCE_REMEDY

if TYPE_CHECKING:
    from PIL import Image

IMAGES, BATCH, SIZE = 256, 32, 256
PHOTOGRAPH = (375, 500)
"""Height and width of most of ImageNet's images."""


class InputSides:
    """Photograph-like JPEG files, read as files and as prepared shards.

    Args:
      images: Number of files.
      size: Height and width of the images in a batch.
    """

    def __init__(self, images: int = IMAGES, size: int = SIZE) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._size, self._count = size, images
        self._files = Path(self._folder.name) / "files"
        _write_photographs(self._files, images)
        shards = Path(self._folder.name) / "shards"
        recipe = [f"--size={size}", "--shards=1", "--workers=1", "--format=jpeg"]
        with contextlib.redirect_stdout(sys.stderr):
            prepare_imagenet.main([str(self._files), str(shards), *recipe])
        self._sources = {
            "folder": self._source("folder", self._files),
            "arrayrecord": self._source("arrayrecord", shards),
        }

    def _source(self, kind: str, root: Path) -> Source:
        size = self._size
        return make_source(kind, root=str(root), image_size=size, channels=3, num_classes=2)

    def ours(self, kind: str) -> Callable[[], int]:
        """Returns a function that reads every image once and returns the sum of all pixels."""
        source, batch = self._sources[kind], min(BATCH, self._count)

        def read() -> int:
            batches, total = make_batches(source, 0, batch, flip=True), 0
            for _ in range(self._count // batch):
                total += int(next(batches)["image"].sum(dtype=np.int64))
            batches.close()  # type: ignore[attr-defined]
            return total

        return read

    def torch(self) -> Callable[[], int]:
        """Returns the same with torch's DataLoader and Pillow, which the original code uses."""
        import torch

        files, size = sorted(self._files.rglob("*.jpg")), self._size

        class Photographs(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return len(files)

            def __getitem__(self, index: int) -> np.ndarray:
                from PIL import Image

                with Image.open(files[index]) as image:
                    pixels = _crop(image.convert("RGB"), size)
                return np.array(pixels[:, ::-1] if torch.rand(()) < 0.5 else pixels)

        loader = torch.utils.data.DataLoader(Photographs(), min(BATCH, self._count), shuffle=True)
        return lambda: sum(int(batch.sum(dtype=torch.int64)) for batch in loader)

    def check(self) -> None:
        """Checks that both sides read the same pixels from the files.

        Raises:
          NumericsError: If the sums of all pixels differ.
        """
        ours, theirs = self.ours("folder")(), self.torch()()
        if ours != theirs:
            raise NumericsError(
                f"ours and PyTorch's pixels add up to {ours} and {theirs}", DIFFERENCE_REMEDY
            )


def _crop(image: "Image.Image", size: int) -> np.ndarray:
    """Returns ADM's center crop, written from its description."""
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(image)
    top, left = ((side - size) // 2 for side in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


def _write_photographs(folder: Path, count: int) -> None:
    """Writes files as detailed as photographs: noise whose amplitude falls with frequency."""
    from PIL import Image

    rng = np.random.default_rng(0)
    height, width = PHOTOGRAPH
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    amplitude = 1 / np.maximum(np.hypot(rows, columns), 1 / width)
    for i in range(count):
        noise = np.fft.rfft2(rng.standard_normal((3, height, width)))
        smooth = np.fft.irfft2(noise * amplitude, (height, width)).transpose(1, 2, 0)
        pixels = np.clip(128 + 40 * smooth / smooth.std(), 0, 255).astype(np.uint8)
        path = folder / f"class{i % 2}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)
