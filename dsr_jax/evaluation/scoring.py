"""Scores of images against a reference, with the recipe that made them.

Two results compare only if their recipes are equal; what else is written down (package versions,
devices, files' names) is for finding out why they are not. Source: spec evaluation 6 and 8.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dsr_jax.core.errors import EvaluationError
from dsr_jax.evaluation.features import (
    METRICS,
    SAVE_EVERY,
    Extractor,
    FeatureStatistics,
    extract_statistics,
    forget,
    outputs_of,
)
from dsr_jax.evaluation.frechet import frechet_distance
from dsr_jax.evaluation.image_sets import ImageSet
from dsr_jax.evaluation.inception_score import SPLIT_SIZE
from dsr_jax.evaluation.kid import SEED, SUBSET_SIZE, SUBSETS, kernel_inception_distance
from dsr_jax.evaluation.precision_recall import NEIGHBOUR, precision_recall
from dsr_jax.evaluation.reference import Reference
from dsr_jax.parallel.processes import is_process_zero

DEFAULT_METRICS = ("fid", "sfid", "is", "pr")


@dataclass
class Result:
    """What scoring gave.

    Attributes:
      scores: Numbers by name.
      recipe: What must be equal for scores to be compared.
      skipped: Metrics left out, and why.
      warnings: What the reader of the scores must know.
      samples: Where the images are from, with their digest.
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
      reference: What to compare with.
      report: Takes what is passed through the network, images done and in all.
    """

    extractor: Extractor
    reference: Reference
    report: Callable[[str, int, int], None] | None = None

    def score(
        self,
        images: ImageSet,
        metrics: list[str] | None = None,
        *,
        folder: Path,
        allow_constant: bool = False,
        save_every: int = SAVE_EVERY,
    ) -> Result:
        """Scores images; on hosts other than the primary the result is empty.

        Args:
          images: The samples.
          metrics: Names in METRICS; None takes those of the ADM evaluator that the reference
            allows, and says which it does not.
          folder: For what a stopped pass goes on from; removed at the end.
          allow_constant: Takes images of a single colour, too.
          save_every: Images between two savings.

        Raises:
          EvaluationError: If images, reference and metrics do not fit.
        """
        result = Result()
        chosen = self.check(images.shape[1:], metrics, result)
        networks = self.extractor.recipe(outputs_of(chosen))
        # Digests are compared before a pass is continued, and written beside the scores.
        about = result.samples = images.describe()
        reference_digest = self.reference.digest()
        settings = {"allow_constant": allow_constant, "save_every": save_every}
        ours = self._pass(images, chosen, folder / "samples", about, **settings)
        theirs = None
        if needed := self.reference.passes(chosen):
            assert self.reference.images is not None
            identity = {"digest": reference_digest}
            theirs = self._pass(
                self.reference.images, needed, folder / "reference", identity, **settings
            )
        if not is_process_zero():
            return result
        self._compute(chosen, ours, theirs, result)
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
        result.warnings += warnings_of(images, chosen, self.extractor.widths)
        forget(folder)
        return result

    def check(self, shape: tuple[int, ...], metrics: list[str] | None, result: Result) -> list[str]:
        """Checks that images of a shape can be scored; returns the metrics to compute, in order.

        Args:
          shape: Height, width and channels.
          metrics: See `score`.
          result: Is told which are left out.

        Raises:
          EvaluationError: If images, reference and metrics do not fit.
        """
        chosen = self._choose(metrics, result)
        recipe = self.extractor.recipe(outputs_of(chosen))
        _check_sizes(shape, self.reference, recipe)
        return chosen

    def _choose(self, metrics: list[str] | None, result: Result) -> list[str]:
        """The metrics to compute, in the order of METRICS."""
        if absent := outputs_of(metrics or DEFAULT_METRICS) - set(self.extractor.widths):
            folder = "--dinov2" if "class_token" in absent else "--inception"
            raise EvaluationError(
                f"no network for {', '.join(metrics or DEFAULT_METRICS)}",
                f"name the folder of its weights with {folder}",
            )
        chosen = []
        for name in METRICS:
            if name not in (DEFAULT_METRICS if metrics is None else metrics):
                continue
            problem = self.reference.missing(name)
            if problem and metrics is not None:
                raise EvaluationError(f"{name} needs more: {problem}", "leave it out of --metrics")
            if problem:
                result.skipped[name] = problem
            else:
                chosen.append(name)
        return chosen

    def _pass(
        self,
        images: ImageSet,
        metrics: list[str],
        folder: Path,
        about: Mapping[str, Any],
        **settings: Any,
    ) -> FeatureStatistics:
        report, name = self.report, folder.name
        return extract_statistics(
            images,
            self.extractor,
            metrics,
            folder=folder,
            identity={"images": dict(about)},
            report=None if report is None else lambda done, total: report(name, done, total),
            **settings,
        )

    def _compute(
        self,
        chosen: list[str],
        ours: FeatureStatistics,
        theirs: FeatureStatistics | None,
        result: Result,
    ) -> None:
        scores, recipe = result.scores, result.recipe
        for name in ("fid", "sfid", "fd_dinov2"):
            if name in chosen:
                scores[name] = self._frechet(name, ours, theirs)
        if ours.score is not None:
            scores["inception_score"] = ours.score.score()
            recipe["inception_score"] = {"rows_per_split": SPLIT_SIZE, "bias": False}
        if not {"pr", "kid"} & set(chosen):
            return
        rows = theirs.rows if theirs is not None and "rows" in theirs.needs else None
        rows = self.reference.features if rows is None else rows
        assert rows is not None
        if "pr" in chosen:
            found = precision_recall(ours.rows, rows)
            scores |= {"precision": found.precision, "recall": found.recall}
            recipe["precision_recall"] = {
                "neighbour": NEIGHBOUR,
                "distances": "float32",
                "reference_images": len(rows),
            }
        if "kid" in chosen:
            size = min(SUBSET_SIZE, ours.count, len(rows))
            kid = kernel_inception_distance(ours.rows, rows, subset_size=size)
            scores |= {"kid": kid.mean, "kid_std": kid.std}
            recipe["kid"] = {"subsets": SUBSETS, "subset_size": size, "seed": SEED}

    def _frechet(
        self, name: str, ours: FeatureStatistics, theirs: FeatureStatistics | None
    ) -> float:
        x, y = ours.gaussian(name), self.reference.statistics.get(name)
        if y is None:
            assert theirs is not None
            y = theirs.gaussian(name)
        return frechet_distance(x.mean, x.cov, y.mean, y.cov)


def _check_sizes(
    wanted: tuple[int, ...], reference: Reference, networks: Mapping[str, Any]
) -> None:
    """Checks that a reference is of images of this shape, and of these networks.

    Raises:
      EvaluationError: If they are of another size, weights or resize.
    """
    recipe = reference.recipe or {}
    shape = reference.images.shape[1:3] if reference.images is not None else recipe.get("size")
    if shape is not None and tuple(shape) != tuple(wanted[:2]):
        raise EvaluationError(
            f"samples have {tuple(wanted[:2])} pixels, images of reference "
            f"{reference.path} {tuple(shape)}",
            "compare with a reference of the samples' size: both are resized, and "
            "what that does to sharpness would be scored",
        )
    for key, ours in networks.items():
        if reference.statistics and recipe.get(key, ours) != ours:
            raise EvaluationError(
                f"reference {reference.path} was made with {key} {recipe[key]}, not {ours}",
                "make it again with tools/make_reference.py, or use the same weights",
            )


def preprocessing_of(reference: Reference) -> str:
    """How a reference's images were cut and resized, as far as its file says."""
    return str((reference.recipe or {}).get("preprocessing", "unknown"))


def label_balance(labels: np.ndarray | None) -> dict[str, int] | None:
    """Number of classes among the samples, and samples of the rarest and the most frequent."""
    if labels is None:
        return None
    counts = np.unique(labels, return_counts=True)[1]
    return {"classes": len(counts), "least": int(counts.min()), "most": int(counts.max())}


def rounding_of(record: Mapping[str, Any] | None) -> str:
    """How a sampling job says that it cast floats to uint8; "unknown" of other programs' files."""
    sampler = ((record or {}).get("recipe") or {}).get("sampler") or {}
    return str(sampler.get("uint8", "unknown"))


def warnings_of(images: ImageSet, metrics: list[str], widths: Mapping[str, int]) -> list[str]:
    """What makes scores of these images hard to compare."""
    count, found = images.shape[0], []
    features = {"fid": "pool", "sfid": "spatial", "fd_dinov2": "class_token"}
    dim = max((widths[features[name]] for name in metrics if name in features), default=0)
    # As many points as dimensions span a hyperplane.
    if count <= dim:
        found.append(
            f"{count} samples for {dim} features: covariances lack rank, and "
            "Frechet distances are far too large; compare them only with those of as many samples"
        )
    elif count < 50_000 and features.keys() & set(metrics):
        found.append(
            f"{count} samples: papers use 50,000, and FID grows as samples get fewer (by 2 to 3 at "
            "10,000)"
        )
    labels = images.labels
    if labels is not None and "is" in metrics and count > SPLIT_SIZE:
        if (np.diff(labels) >= 0).all() and labels[0] != labels[-1]:
            found.append(
                "samples are sorted by class: the Inception Score, taken over runs of "
                f"{SPLIT_SIZE}, is far too low; shuffle them"
            )
    return found
