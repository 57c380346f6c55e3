"""Scores of images against a reference, with the recipe that made them.

Two results compare only if their recipes are equal; what else is recorded (package versions,
devices, files' names) is for finding out why they are not. Source: spec evaluation 6 and 8.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dsr_jax.core.errors import EvaluationError
from dsr_jax.evaluation.features import Extractor
from dsr_jax.evaluation.image_sets import ImageSet
from dsr_jax.evaluation.metric import Metric, needs_of
from dsr_jax.evaluation.metrics import DEFAULT, find_metrics
from dsr_jax.evaluation.networks import unpublished
from dsr_jax.evaluation.passes import SAVE_EVERY, forget, update_metrics
from dsr_jax.evaluation.reference import Reference
from dsr_jax.parallel.processes import is_process_zero
from dsr_jax.telemetry.progress import announce


@dataclass
class Result:
    """Scores with their recipe and warnings.

    Attributes:
      scores: Numbers by name.
      recipe: Settings that must be equal for scores to be comparable.
      skipped: Metrics left out, and why.
      warnings: Warnings for readers of the scores.
      samples: Source of the images, with their digest.
    """

    scores: dict[str, float] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    samples: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scorer:
    """Scores sets of images against one reference.

    Args:
      extractor: The feature networks.
      reference: Reference to compare with.
      report: Called with what passes through the networks; returns a function that is called with
        images done and in all.
    """

    extractor: Extractor
    reference: Reference
    report: Callable[[str], Callable[[int, int], None]] | None = None

    def score(
        self,
        images: ImageSet,
        metrics: Sequence[str] | None = None,
        *,
        folder: Path,
        allow_constant: bool = False,
        save_every: int = SAVE_EVERY,
    ) -> Result:
        """Scores images; on processes other than 0 the result is empty.

        Args:
          images: The samples.
          metrics: Names in METRICS, or "package.module:Class"; None takes those of the ADM
            evaluator that the reference allows, and lists the others as skipped.
          folder: For what a stopped pass continues from; removed at the end.
          allow_constant: Takes images of a single color, too.
          save_every: Images between two savings.

        Raises:
          EvaluationError: If images, reference and metrics do not fit.
        """
        result = Result()
        chosen = self.check(images.shape, metrics, result)
        networks = self.extractor.recipe(needs_of(chosen))
        # Digests are compared before a pass is continued, and written beside the scores.
        with announce("computing checksums of the images", only_if_slow=True):
            about = result.samples = images.describe()
            reference_digest = self.reference.digest()
        settings = {"allow_constant": allow_constant, "save_every": save_every}
        ours = self._pass(images, chosen, folder / "samples", about, **settings)
        theirs = {
            metric: given
            for metric in chosen
            if (given := metric.from_reference(self.reference)) is not None
        }
        absent = [m for m in chosen if m.needs_reference and m not in theirs]
        if absent:
            assert self.reference.images is not None
            identity = {"digest": reference_digest}
            theirs |= self._pass(
                self.reference.images, absent, folder / "reference", identity, **settings
            )
        if not is_process_zero():
            return result
        result.recipe |= {
            **networks,
            "arithmetic": "float32",
            "reference": reference_digest,
            "reference_preprocessing": preprocessing_of(self.reference),
            "num_samples": images.shape[0],
            "image_shape": list(images.shape[1:]),
            "labels": label_balance(images.labels),
            "rounding": rounding_of(about.get("record")),
        }
        for kind, metric in ours.items():
            with announce(f"computing {metric.name}", only_if_slow=True):
                result.scores |= metric.compute(theirs.get(kind))
            result.recipe |= metric.recipe(theirs.get(kind))
            result.warnings += [w for w in metric.warnings(images) if w not in result.warnings]
        result.warnings += filter(None, map(unpublished, self.extractor.records))
        if about.get("digest") == reference_digest:
            result.warnings.append(
                "samples and reference are the same images: the scores are those of a perfect copy"
            )
        if lossy := about.get("lossy"):
            result.warnings.append(
                f"samples are {', '.join(lossy)} files: lossy compression changes every score; "
                "score PNG files or an .npz"
            )
        forget(folder)
        return result

    def check(
        self, shape: tuple[int, ...], metrics: Sequence[str] | None, result: Result
    ) -> list[type[Metric]]:
        """Checks that images of a shape can be scored; returns the metrics to compute, in order.

        Args:
          shape: [N, H, W, C].
          metrics: See `score`.
          result: Receives which metrics are left out.

        Raises:
          EvaluationError: If images, reference and metrics do not fit.
        """
        chosen = self._choose(metrics, result)
        recipe = self.extractor.recipe(needs_of(chosen))
        _check_sizes(shape[1:], self.reference, recipe)
        for metric in chosen:
            _check_count(metric, shape[0], self.reference)
            for name, width in metric.reference_widths(self.reference).items():
                if (ours := self.extractor.widths[name]) != width:
                    raise EvaluationError(
                        f"{metric.name}: sample features have width {ours}, reference features "
                        f"{width} ({self.reference.path})",
                        "compare features of the same network and layer",
                    )
        return chosen

    def _choose(self, names: Sequence[str] | None, result: Result) -> list[type[Metric]]:
        """Returns the metrics to compute, in the order of METRICS."""
        wanted = DEFAULT if names is None else names
        metrics = find_metrics(wanted)
        known = {*self.extractor.widths, "images", "labels"}
        if absent := needs_of(metrics) - known:
            folder = "--dinov2" if "class_token" in absent else "--inception"
            raise EvaluationError(
                f"no network for {', '.join(wanted)}",
                f"name the folder of its weights with {folder}",
            )
        chosen = []
        for metric in metrics:
            problem = metric.missing(self.reference)
            if problem and names is not None:
                raise EvaluationError(
                    f"{metric.name} needs more: {problem}", "leave it out of --metrics"
                )
            if problem:
                result.skipped[metric.name] = problem
            else:
                chosen.append(metric)
        return chosen

    def _pass(
        self,
        images: ImageSet,
        kinds: Sequence[type[Metric]],
        folder: Path,
        about: Mapping[str, Any],
        **settings: Any,
    ) -> dict[type[Metric], Metric]:
        metrics = {kind: kind() for kind in kinds}
        update_metrics(
            images,
            self.extractor,
            list(metrics.values()),
            folder=folder,
            identity={"images": dict(about)},
            report=None if self.report is None else self.report(folder.name),
            **settings,
        )
        return metrics


def _check_count(metric: type[Metric], count: int, reference: Reference) -> None:
    """Checks that there are enough samples and reference images for a metric.

    Raises:
      EvaluationError: If there are not.
    """
    counts = {"samples": count}
    if metric.needs_reference and metric.from_reference(reference) is None:
        assert reference.images is not None
        counts["reference images"] = reference.images.shape[0]
    for what, number in counts.items():
        if number < metric.min_images:
            raise EvaluationError(
                f"{metric.name} needs at least {metric.min_images} {what}, there are {number}",
                f"give more {what}, or leave {metric.name} out of --metrics",
            )


def _check_sizes(
    wanted: tuple[int, ...], reference: Reference, networks: Mapping[str, Any]
) -> None:
    """Checks that a reference is of images of this size, and of these networks.

    Raises:
      EvaluationError: If they are of another size, weights or resize.
    """
    recipe = reference.recipe or {}
    shape = reference.images.shape[1:3] if reference.images is not None else recipe.get("size")
    if shape is not None and tuple(shape) != tuple(wanted[:2]):
        raise EvaluationError(
            f"samples have {tuple(wanted[:2])} pixels, images of reference "
            f"{reference.path} {tuple(shape)}",
            "compare with a reference of the samples' size: both are resized for the network, and "
            "the loss of sharpness would be scored",
        )
    for key, ours in networks.items():
        if reference.statistics and recipe.get(key, ours) != ours:
            raise EvaluationError(
                f"reference {reference.path} was made with {key} {recipe[key]}, not {ours}",
                "make it again with tools/make_reference.py, or use the same weights",
            )


def preprocessing_of(reference: Reference) -> str:
    """Returns how a reference's images were cropped and resized, as far as its file records it."""
    return str((reference.recipe or {}).get("preprocessing", "unknown"))


def label_balance(labels: np.ndarray | None) -> dict[str, int] | None:
    """Returns the number of classes, and the samples of the rarest and of the most frequent."""
    if labels is None:
        return None
    counts = np.unique(labels, return_counts=True)[1]
    return {"classes": len(counts), "least": int(counts.min()), "most": int(counts.max())}


def rounding_of(record: Mapping[str, Any] | None) -> str:
    """Returns how a sampling job cast floats to uint8; "unknown" for other programs' files."""
    sampler = ((record or {}).get("recipe") or {}).get("sampler") or {}
    return str(sampler.get("uint8", "unknown"))
