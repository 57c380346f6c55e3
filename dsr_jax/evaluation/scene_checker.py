"""Exact checker of rendered scenes: objects, colors, counts and positions read from pixels.

It takes the place of GenEval's detector and color classifier; what is correct is decided by
GenEval's own rules.

Source: spec t2i 10.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.ndimage

from dsr_jax.evaluation import geneval

MIN_PIXELS = 6
"""Pixels of the smallest connected region that can be an object."""
MIN_OVERLAP = 0.62
"""Intersection over union with a kind's mask from which a region is of that kind."""


class SceneChecker:
    """Finds the objects of rendered scenes.

    Args:
      palette: RGB color by name.
      background: RGB color of what is no object.
      masks: Pixels of each kind of object, bool [k, k].
      scene_size: Side of a scene in the masks' pixels; images are reduced to it.
    """

    def __init__(
        self,
        palette: Mapping[str, Sequence[int]],
        background: Sequence[int],
        masks: Mapping[str, np.ndarray],
        scene_size: int,
    ) -> None:
        self._colors = list(palette)
        self._values = np.asarray([background, *palette.values()], np.float64)
        self._masks = dict(masks)
        self._scene_size = scene_size

    def detect(self, image: np.ndarray) -> tuple[dict[str, list[Any]], dict[str, list[str]]]:
        """Returns boxes x1, y1, x2, y2, score = 1 and colors of the objects, both by kind.

        Args:
          image: uint8 [H, H, 3], H a multiple of the scene's size.
        """
        scale = image.shape[0] // self._scene_size
        shape = (self._scene_size, scale, self._scene_size, scale, 3)
        pixels = image.reshape(shape).mean(axis=(1, 3))
        distances = np.square(pixels[:, :, None] - self._values).sum(axis=-1)
        nearest = distances.argmin(axis=-1) - 1
        boxes: dict[str, list[Any]] = {}
        colors: dict[str, list[str]] = {}
        for number, color in enumerate(self._colors):
            regions, _ = scipy.ndimage.label(nearest == number, np.ones((3, 3)))
            for label, (rows, columns) in enumerate(scipy.ndimage.find_objects(regions), start=1):
                if (kind := self._kind(regions == label, rows.start, columns.start)) is not None:
                    box = [columns.start, rows.start, columns.stop - 1, rows.stop - 1, 1.0]
                    boxes.setdefault(kind, []).append(box)
                    colors.setdefault(kind, []).append(color)
        return boxes, colors

    def _kind(self, region: np.ndarray, top: int, left: int) -> str | None:
        """Returns the kind whose mask, moved by up to a pixel, fits a region best."""
        if (area := int(region.sum())) < MIN_PIXELS:
            return None
        best, found = MIN_OVERLAP, None
        for kind, mask in self._masks.items():
            side = len(mask)
            padded = np.pad(region, side)
            for y in range(top + side - 1, top + side + 2):
                for x in range(left + side - 1, left + side + 2):
                    shared = int((padded[y : y + side, x : x + side] & mask).sum())
                    overlap = shared / (area + int(mask.sum()) - shared)
                    if overlap >= best:
                        best, found = overlap, kind
        return found

    def is_correct(self, prompt: Mapping[str, Any], image: np.ndarray) -> bool:
        """Returns whether an image shows what its prompt, a line of metadata, asks for."""
        boxes, colors = self.detect(image)
        return geneval.is_correct(
            prompt, boxes, lambda kind, found: [colors[kind][i] for i in found]
        )

    def score(
        self, prompts: Sequence[Mapping[str, Any]], images: Sequence[np.ndarray]
    ) -> dict[str, Any]:
        """Scores images of prompts.

        Args:
          prompts: Metadata of each image's prompt.
          images: uint8 [H, H, 3] each.

        Returns:
          The entries of `geneval.summarize`, and `shuffled`: the same entries of the images against
          the prompts of other images, which is the score by chance.
        """
        results = {}
        for name, asked in (("own", list(prompts)), ("shuffled", shuffled(prompts))):
            correct = [self.is_correct(p, i) for p, i in zip(asked, images, strict=True)]
            texts = [prompt["prompt"] for prompt in asked]
            results[name] = geneval.summarize([prompt["tag"] for prompt in asked], texts, correct)
        return results["own"] | {"shuffled": results["shuffled"]}


def shuffled(prompts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the prompts in an order in which, if that is possible, none keeps its text's index.

    The prompts are ordered at random, equal texts together, and moved on by the largest number of
    equal ones.
    """
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt["prompt"], []).append(index)
    texts = list(groups)
    order = np.random.default_rng(0).permutation(len(texts))
    indices = [index for number in order for index in groups[texts[number]]]
    step = max((len(group) for group in groups.values()), default=0)
    result = list(prompts)
    for rank, index in enumerate(indices):
        result[index] = prompts[indices[(rank + step) % len(indices)]]
    return result
