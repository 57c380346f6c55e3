"""Image files in class folders, as ImageNet is laid out."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from dsr_jax.core.errors import DataError
from dsr_jax.core.images import (
    EXTENSIONS,
    find_folders,
    find_image_files,
    list_folder,
    read_file,
)
from dsr_jax.data.base import Record, SourceOptions
from dsr_jax.data.class_map import labels_of, names_by_label
from dsr_jax.data.classes import fingerprint
from dsr_jax.data.images import decode_image, fit_name

SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "heldout"}


class ImageFolder:
    """Images below `root/CLASS/`; class names in sorted order have the labels 0, 1, ...

    If `root/SPLIT` is a folder of folders, it takes the place of `root`, so that both
    `imagenet` and `imagenet/train` may be named. Folders may be nested below a class.
    Names that `core.images.is_hidden` lists are left out.

    Args:
      options: `root`; `split`, for example "train" or "val"; size, channels and `fit` of the
        images; `class_map`, if labels are to follow another order than that of strings.

    Raises:
      DataError: If the folder or its classes or images are missing, naming what is there, or a
        class is missing in the class map.
    """

    def __init__(self, options: SourceOptions) -> None:
        options.require_gray_or_rgb("folder")
        self._root = _resolve(Path(options.require_root("folder")), options.split)
        self._fit = fit_name(options.fit)
        self.name = f"folder {self._root}"
        self.image_shape = options.image_shape
        folders = find_folders(self._root)
        _check_classes(self._root, folders)
        labels = labels_of(folders, options.class_map)
        self.class_names = names_by_label(labels)
        self.num_classes = len(self.class_names)
        files = {name: _image_files(self._root, name) for name in folders}
        for name, found in files.items():
            if not found:
                raise DataError(
                    f"class folder {self._root / name} holds no images",
                    f"delete it, or fill it with {', '.join(EXTENSIONS)}",
                )
        # By label, so that with a class map, too, the record's index follows from its class.
        self.class_counts = [len(files.get(name, ())) for name in self.class_names]
        self._files = [path for name in self.class_names for path in files.get(name, ())]
        self._labels = np.repeat(np.arange(self.num_classes, dtype=np.int32), self.class_counts)
        self.fingerprint = fingerprint(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def encoded(self, index: int) -> tuple[bytes, int]:
        """Returns the file's content and the label of record `index`.

        Raises:
          DataError: If the file cannot be read.
        """
        return read_file(self._root / self._files[index]), int(self._labels[index])

    def origin(self, index: int) -> str:
        """Returns the path of record `index`, for error messages."""
        return str(self._root / self._files[index])

    def __getitem__(self, index: int) -> Record:
        """Reads one image.

        Raises:
          UnreadableRecord: If the content is no image.
          DataError: If the file cannot be read at all.
        """
        content, label = self.encoded(index)
        size, _, channels = self.image_shape
        image = decode_image(content, self.origin(index), size, channels, fit=self._fit)
        return {"image": image, "label": np.int32(label)}


def _resolve(root: Path, split: str) -> Path:
    """Returns the folder that contains the class folders."""
    if not root.exists():
        parent = next(p for p in root.absolute().parents if p.exists())
        names = ", ".join(sorted(p.name for p in parent.iterdir())[:8]) if parent.is_dir() else ""
        raise DataError(
            f"data folder {str(root)!r} does not exist",
            f"set config.data.root; {parent} exists and holds: {names or 'nothing'}",
        )
    if not root.is_dir():
        raise DataError(f"data root {str(root)!r} is a file", "set config.data.root to a folder")
    inner = root / split
    return inner if inner.is_dir() and find_folders(inner) else root


def _check_classes(root: Path, names: list[str]) -> None:
    """Checks that `names` look like classes.

    Raises:
      DataError: If there are none, or they look like splits.
    """
    layout = "images belong in one folder per class: ROOT/cat/1.jpg, ROOT/dog/2.jpg"
    if not names:
        images = sum(e.name.lower().endswith(EXTENSIONS) for e in list_folder(root))
        if images:
            raise DataError(f"data folder {root} holds {images} images, no class folders", layout)
        raise DataError(f"data folder {root} is empty: no class folders, no images", layout)
    if set(names) <= SPLIT_NAMES:
        raise DataError(
            f"the folders in {root} look like splits, not classes: {', '.join(names)}",
            f"set config.data.split to one of {', '.join(names)}",
        )


def _image_files(root: Path, class_name: str) -> list[str]:
    """Lists image files below a class folder, relative to `root`, sorted by path."""
    return sorted(os.path.join(class_name, path) for path in find_image_files(root / class_name))
