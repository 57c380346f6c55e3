"""Opens references and networks and writes scores to files, for all commands that score."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from jax.sharding import Mesh

from dsr_jax.convert.hub import load_class_encoder
from dsr_jax.convert.inception import load_inception
from dsr_jax.core.errors import EvaluationError
from dsr_jax.core.files import read_json, remove_leftovers, write_json
from dsr_jax.core.provenance import provenance
from dsr_jax.data.sources import make_source, read_all
from dsr_jax.evaluation.classifier import classifier_scores
from dsr_jax.evaluation.features import Extractor
from dsr_jax.evaluation.image_sets import ImageSet
from dsr_jax.evaluation.networks import dinov2_features, inception_features, unpublished
from dsr_jax.evaluation.passes import SAVE_EVERY
from dsr_jax.evaluation.reference import open_reference
from dsr_jax.evaluation.samples import SampleFile, check_levels
from dsr_jax.evaluation.scoring import Result, Scorer
from dsr_jax.parallel.mesh import MeshShape, make_mesh
from dsr_jax.parallel.processes import is_process_zero, log
from dsr_jax.telemetry.progress import LINE_SECONDS, format_seconds


def check_writable(folder: Path) -> None:
    """Checks that files can be written into a folder, or that it can be made; leaves nothing.

    Raises:
      EvaluationError: If they cannot.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".writable"):
            pass
    except OSError as error:
        raise EvaluationError(
            f"nothing can be written into {folder}: {error}", "name another --out"
        ) from error


def check_output(out: Path, samples: ImageSet, reference: str | None = None) -> None:
    """Checks that scores can be written to a file, and that it holds no others.

    Scores of the same samples and reference may be replaced.

    Args:
      out: Path of the file.
      samples: Samples to score.
      reference: Path of the reference, if there is one.

    Raises:
      EvaluationError: If the file cannot be written, is of another kind, or has other scores.
    """
    if out.is_dir():
        raise EvaluationError(f"--out={out} is a folder", "name a file")
    check_writable(out.parent)
    if not out.exists():
        return
    try:
        content = read_json(out)
        found = content["samples"]["digest"], content.get("recipe", {}).get("reference")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"{out} exists and holds no scores",
            "name another --out, or remove the file; nothing was written",
        ) from error
    wanted = samples.describe()["digest"], open_reference(reference).digest() if reference else None
    for name, ours, theirs in zip(("samples", "reference"), wanted, found, strict=True):
        if ours != theirs:
            raise EvaluationError(
                f"{out} holds scores of other {name}",
                "name another --out, or remove the file; nothing was written",
            )


def make_extractor(
    inception: str | None,
    dinov2: str | None = None,
    batch: int = 64,
    resize: str = "adm",
    mesh: Mesh | None = None,
) -> Extractor:
    """Reads feature networks.

    Args:
      inception: Folder of converted weights, or None or "" to do without.
      dinov2: Folder of a converted DINOv2 with its class output, or None.
      batch: Images at a time over all devices.
      resize: Method of resizing to 299 pixels, a name in `models.inception_input.RESIZES`.
      mesh: The devices; None for all there are.

    Raises:
      ConversionError: If weights are missing, with where to get them.
    """
    networks = []
    if inception:
        network, params, record = load_inception(inception)
        networks.append(inception_features(network, params, record, resize))
    if dinov2:
        networks.append(dinov2_features(*load_class_encoder(dinov2)))
    for each in networks:
        if problem := unpublished(each.record):
            log(f"warning: {problem}")
    return Extractor(networks, mesh or make_mesh(MeshShape()), batch)


def make_scorer(
    reference: str,
    inception: str | None,
    dinov2: str | None = None,
    batch: int = 64,
    resize: str = "adm",
    mesh: Mesh | None = None,
) -> Scorer:
    """Reads reference and networks; arguments as those of `make_extractor`.

    Raises:
      EvaluationError: If the reference cannot be read.
      ConversionError: If weights are not there.
    """
    opened = open_reference(reference)
    extractor = make_extractor(inception, dinov2, batch, resize, mesh)
    return Scorer(extractor, opened, lambda name: PassReport(f"features of {name}"))


def score_to_file(
    scorer: Scorer,
    images: ImageSet,
    metrics: Sequence[str] | None,
    out: Path,
    *,
    allow_constant: bool = False,
    save_every: int = SAVE_EVERY,
) -> Result:
    """Scores images and writes scores, recipe and provenance to a JSON file.

    Args:
      scorer: Result of `make_scorer`.
      images: The samples.
      metrics: Names, or None for those that the reference allows.
      out: Path of the file; a folder next to it stores the progress of an interrupted pass.
      allow_constant: Takes images of a single color, too.
      save_every: Images between two savings.

    Raises:
      EvaluationError: If samples, reference and metrics do not fit.
    """
    folder = out.with_name(f"{out.name}.parts")
    if is_process_zero():
        for place, name in ((out.parent, out.name), (folder, "")):
            remove_leftovers(place, name)
    chosen = None if metrics is None else list(metrics)
    result = scorer.score(
        images, chosen, folder=folder, allow_constant=allow_constant, save_every=save_every
    )
    if is_process_zero():
        reference = scorer.reference
        about = {
            "file": reference.path.name,
            "statistics": sorted(map(", ".join, reference.statistics)),
            "images": 0 if reference.images is None else reference.images.shape[0],
            "recipe": reference.recipe,
        }
        content = {
            "scores": result.scores,
            "recipe": result.recipe,
            "warnings": result.warnings,
            "skipped": result.skipped,
            "samples": result.samples,
            "reference": about,
            "networks": scorer.extractor.records,
            "provenance": provenance(),
        }
        write_json(out, content)
    return result


def score_with_classifier(samples: SampleFile, source: str) -> dict[str, Any]:
    """Scores samples with a classifier trained on the training split of a data source.

    Args:
      samples: The samples, with labels.
      source: Name of a bundled data source, read at the samples' size.

    Raises:
      EvaluationError: If the samples do not fit.
      DataError: If the source cannot be read at the samples' size.
    """
    labels = samples.require_labels(f"the classifier of {source!r}")
    images = samples.images()
    check_levels(images, samples.path)
    _, height, _, channels = samples.shape
    train, heldout = (
        read_all(make_source(source, split=split, image_size=height, channels=channels))
        for split in ("train", "heldout")
    )
    return classifier_scores(images, labels, train, heldout)


class PassReport:
    """Logs the progress, rate and remaining time of a pass every few seconds.

    Args:
      what: Name of the pass, which begins each line.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._start: tuple[int, float] | None = None
        self._logged = monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Takes images done, and in all."""
        now = monotonic()
        if self._start is None:
            # The first batch has waited for the compilation, or was there already.
            self._start = (done, now)
        elif done < total and now - self._logged < LINE_SECONDS:
            return
        self._logged = now
        first, began = self._start
        text = f"{self._what}: {done}/{total}"
        if done > first and now > began:
            rate = (done - first) / (now - began)
            text += f", {rate:.4g}/s"
            if done < total:
                text += f", ETA {format_seconds((total - done) / rate)}"
        log(text)
