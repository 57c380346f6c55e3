"""Images anywhere below a folder, without classes: the input of encoder studies."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dsr_jax.core.errors import DataError, UnreadableRecord
from dsr_jax.core.images import EXTENSIONS, find_image_files, read_file
from dsr_jax.data.base import Record
from dsr_jax.data.images import decode_image, fit_name


class UnlabeledImages:
    """Random sample of the image files below a folder, at any depth.

    Args:
      root: The folder.
      image_size: Side of the square images.
      count: Number of files, chosen at random; None, or more than there are, for all.
      seed: Fixes which.
      fit: A name in `images.FITS`; encoders' own image processors use "squash".
      on_corrupt: "error" raises when a file that cannot be decoded is read; "skip" tries all files
        at the start, which takes as long as reading them, and leaves such files out.

    Raises:
      DataError: If the folder is not there or holds no images.
    """

    num_classes = 1

    def __init__(
        self,
        root: str,
        image_size: int,
        *,
        count: int | None = None,
        seed: int = 0,
        fit: str = "squash",
        on_corrupt: str = "error",
    ) -> None:
        folder = Path(root)
        if not folder.is_dir():
            raise DataError(f"image folder {root!r} does not exist", "name an existing folder")
        files = [folder / path for path in find_image_files(folder)]
        if not files:
            raise DataError(
                f"folder {root!r} holds no images", f"put {', '.join(EXTENSIONS)} there"
            )
        if count is not None and count < len(files):
            chosen = np.random.default_rng(seed).choice(len(files), count, replace=False)
            files = [files[i] for i in sorted(chosen)]
        self._files = files
        self._fit = fit_name(fit)
        self.name = f"folder {folder}"
        self.image_shape = (image_size, image_size, 3)
        self.skipped: list[Path] = []
        if on_corrupt == "skip":
            self._skip_unreadable()

    def _skip_unreadable(self) -> None:
        with ThreadPoolExecutor() as pool:
            readable = list(pool.map(self._is_readable, range(len(self._files))))
        pairs = list(zip(self._files, readable, strict=True))
        self.skipped = [path for path, whole in pairs if not whole]
        self._files = [path for path, whole in pairs if whole]
        if not self._files:
            raise DataError(f"no image in {self.name} can be decoded", f"first: {self.skipped[0]}")

    def _is_readable(self, index: int) -> bool:
        try:
            self[index]
        except UnreadableRecord:
            return False
        return True

    def __len__(self) -> int:
        return len(self._files)

    def path(self, index: int) -> Path:
        """Returns the path of image `index`."""
        return self._files[index]

    def __getitem__(self, index: int) -> Record:
        """Reads one image; the label is 0.

        Raises:
          UnreadableRecord: If the content is no image, or cut short.
          DataError: If the file cannot be read at all.
        """
        path = self._files[index]
        size = self.image_shape[0]
        image = decode_image(read_file(path), str(path), size, 3, fit=self._fit)
        return {"image": image, "label": np.int32(0)}
