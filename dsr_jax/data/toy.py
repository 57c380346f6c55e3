"""Toy data sets that need no download: scanned digits and generated shapes."""

from __future__ import annotations

import numpy as np

from dsr_jax.core.errors import DataError
from dsr_jax.data.base import Record, SourceOptions, split_indices

DIGITS_SIZE = 8
NUM_SHAPES = 50_000
SHAPES_SEED = 2_024


class Digits:
    """Scikit-learn's 1,797 handwritten digits, 8 x 8 scans with 17 gray levels.

    Args:
      options: `image_size` is a multiple of 8, pixels are repeated; `channels` is 1, or 3 equal
        ones; `split` is "train", "heldout" (every fifth) or "all".

    Raises:
      DataError: If scikit-learn is missing, the size is no multiple of 8, or the split unknown.
    """

    name = "digits"
    num_classes = 10

    def __init__(self, options: SourceOptions) -> None:
        options.require_gray_or_rgb(self.name)
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError(
                "data source 'digits' needs scikit-learn", "pip install scikit-learn"
            ) from error
        if options.image_size % DIGITS_SIZE or options.image_size <= 0:
            raise DataError(
                f"digits of {DIGITS_SIZE} pixels cannot become {options.image_size} pixels",
                f"set config.data.image_size to a multiple of {DIGITS_SIZE}",
            )
        images, labels = load_digits(return_X_y=True)
        indices = split_indices(len(images), options.split, self.name)
        gray = np.round(images[indices] * (255 / 16)).astype(np.uint8)
        gray = gray.reshape(-1, DIGITS_SIZE, DIGITS_SIZE)
        scale = options.image_size // DIGITS_SIZE
        gray = gray.repeat(scale, axis=1).repeat(scale, axis=2)
        self._images = np.repeat(gray[..., None], options.channels, axis=-1)
        self._labels = labels[indices].astype(np.int32)
        self.class_names = [str(digit) for digit in range(self.num_classes)]
        self.class_counts = np.bincount(self._labels, minlength=self.num_classes).tolist()
        self.image_shape = options.image_shape

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        return {"image": self._images[index], "label": self._labels[index]}


class Shapes:
    """One disk, square, diamond or ring on a shaded background; the label fixes shape and color.

    Args:
      options: Any `image_size` and `channels`; `split` is "train", "heldout" (every fifth) or
        "all"; `num_classes`, 10 by default, are equally frequent.

    Raises:
      DataError: If the split is unknown.
    """

    name = "synthetic"

    def __init__(self, options: SourceOptions) -> None:
        self._indices = split_indices(NUM_SHAPES, options.split, self.name)
        self.num_classes = options.num_classes or 10
        self.image_shape = options.image_shape

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        number = int(self._indices[index])
        rng = np.random.default_rng([SHAPES_SEED, number])
        # At random, since number % num_classes would leave some classes out of a split.
        label = int(rng.integers(self.num_classes))
        size, _, channels = self.image_shape
        grid = (np.arange(size) + 0.5) / size
        y, x = grid[:, None], grid[None, :]

        angle, base = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.5, channels)
        slope = (np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5)) * 0.3
        image = base + slope[..., None]
        hue = label / self.num_classes + np.arange(channels) / channels
        mask = self._mask(label % 4, x - rng.uniform(0.3, 0.7), y - rng.uniform(0.3, 0.7), rng)
        image = np.where(mask[..., None], 0.6 + 0.4 * np.cos(2 * np.pi * hue), image)
        return {
            "image": np.round(image.clip(0, 1) * 255).astype(np.uint8),
            "label": np.int32(label),
        }

    @staticmethod
    def _mask(form: int, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the mask of a form on the grid, bool [size, size]."""
        radius = rng.uniform(0.15, 0.3)
        if form == 1:
            return np.maximum(abs(x), abs(y)) < radius
        if form == 2:
            return abs(x) + abs(y) < radius
        distance = np.hypot(x, y)
        inner = radius / 2 if form == 3 else -1.0
        return (distance < radius) & (distance > inner)
