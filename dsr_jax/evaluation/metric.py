"""Interface of metrics: required features of each image, `update` and `compute`."""

import abc
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import numpy as np

from dsr_jax.evaluation.image_sets import ImageSet
from dsr_jax.evaluation.reference import Reference


class Metric(abc.ABC):
    """One metric of a set of images.

    One instance collects what the samples are like, a second one of the same class what the
    reference is like, and the first computes the scores from both. Images arrive in their order, on
    process 0 alone; results must not depend on how they are divided into batches.

    Attributes:
      name: Its name in --metrics and `config.eval.metrics`.
      needs: What `update` receives of each image: features of the networks ("pool", "spatial" and
        "logits" of Inception, "class_token" of DINOv2), "images" (uint8 [B, H, W, C]), "labels".
      needs_reference: Whether `compute` compares with a reference.
      min_images: Images without which it is not defined, of samples and of the reference.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    needs_reference: ClassVar[bool] = True
    min_images: ClassVar[int] = 1

    @abc.abstractmethod
    def update(self, batch: Mapping[str, np.ndarray]) -> None:
        """Adds the next images.

        Args:
          batch: Arrays [B, ...] by name, those that the metric needs.

        Raises:
          EvaluationError: If a value cannot be used, naming the image.
        """

    @abc.abstractmethod
    def compute(self, reference: Self | None) -> dict[str, float]:
        """Returns the scores by name.

        Args:
          reference: Result of `from_reference`; None for metrics without reference.
        """

    def recipe(self, reference: Self | None) -> dict[str, Any]:
        """Returns settings that two scores must share to be compared, under one name."""
        return {}

    def warnings(self, images: ImageSet) -> list[str]:
        """Returns what the reader of this metric's scores must know about the samples."""
        return []

    @classmethod
    def from_reference(cls, reference: Reference) -> Self | None:
        """Returns what a reference file holds ready for this metric; None to use its images."""
        return None

    @classmethod
    def reference_widths(cls, reference: Reference) -> dict[str, int]:
        """Returns the widths of what a reference file holds ready, by name of the features."""
        return {}

    @classmethod
    def missing(cls, reference: Reference) -> str:
        """Returns what the reference lacks for this metric; "" if it can be computed."""
        if not cls.needs_reference or reference.images is not None:
            return ""
        return "" if cls.from_reference(reference) else f"{reference.path} has no images"

    def state(self) -> dict[str, np.ndarray] | None:
        """Returns the arrays from which `restore` continues after an interruption.

        None if the metric is restored by `update` with all that it has received: the pass then
        keeps that on disk, once for all metrics that need it.
        """
        return None

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continues from what `state` returned."""
        raise NotImplementedError


def needs_of(metrics: Iterable[Metric | type[Metric]]) -> frozenset[str]:
    """Returns what these metrics need of each image, all together."""
    return frozenset[str]().union(*(metric.needs for metric in metrics))


class PooledFeatureMetric(Metric):
    """A metric of Inception's pooled features of all images, which are kept.

    Batches are kept as they are, so that several such metrics share their memory.
    """

    needs: ClassVar[frozenset[str]] = frozenset(("pool",))

    def __init__(self) -> None:
        self._batches: list[np.ndarray] = []

    @property
    def count(self) -> int:
        """Images so far."""
        return sum(map(len, self._batches))

    def features(self) -> np.ndarray:
        """Returns the features of all images [N, D], float32."""
        return np.concatenate(self._batches) if self._batches else np.zeros((0, 0), np.float32)

    def update(self, batch: Mapping[str, np.ndarray]) -> None:
        """Keeps the features."""
        self._batches.append(batch["pool"])

    @classmethod
    def from_reference(cls, reference: Reference) -> Self | None:
        """Takes the features that tools/make_reference.py has written."""
        if reference.features is None:
            return None
        metric = cls()
        metric.update({"pool": reference.features})
        return metric

    @classmethod
    def reference_widths(cls, reference: Reference) -> dict[str, int]:
        """Returns the width of the file's features."""
        return {} if reference.features is None else {"pool": reference.features.shape[1]}
