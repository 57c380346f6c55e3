"""Scores samples and writes the numbers, with their recipe, to a file.

    python -m dsr_jax.evaluate samples.npz --reference ref.npz --inception DIR --out scores.json
    python -m dsr_jax.evaluate runs/digits/samples/NAME.npz --judge digits

Samples are an `.npz` with `arr_0` (uint8, [N, H, W, C]; `labels` where the class matters), or a
folder of PNG files, of any program. With a reference the scores are FID, sFID, Inception Score,
precision and recall as the ADM evaluator defines them, and KID; --inception is a folder that
`python -m dsr_jax.convert inception` wrote. The same command goes on where a stopped one was, also
on other devices; on several hosts the files must be ones that all of them see.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from dsr_jax.convert.inception import load_inception
from dsr_jax.core import cli
from dsr_jax.core.errors import EvaluationError
from dsr_jax.core.files import write_json
from dsr_jax.core.provenance import provenance
from dsr_jax.data.sources import make_source, read_all
from dsr_jax.evaluation.features import METRICS, Extractor
from dsr_jax.evaluation.image_sets import ImageSet, open_images
from dsr_jax.evaluation.judge import judge_samples
from dsr_jax.evaluation.reference import open_reference
from dsr_jax.evaluation.samples import SampleFile, check_levels, open_samples
from dsr_jax.evaluation.scoring import Result, Scorer
from dsr_jax.models.inception_input import RESIZES
from dsr_jax.parallel.mesh import MeshShape, make_mesh
from dsr_jax.parallel.processes import is_primary, say, start_processes

_REPORT_SECONDS = 10.0


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    args = _parser().parse_args(argv)
    if args.reference is None:
        judge(args)
        return
    if args.judge or not args.inception:
        raise EvaluationError(
            "--reference needs --inception, and goes without --judge",
            "name the folder that python -m dsr_jax.convert inception wrote",
        )
    start_processes()
    compare(args)


def compare(args: argparse.Namespace) -> None:
    """Scores samples against a reference and writes the result.

    Raises:
      EvaluationError: If samples, reference and metrics do not fit.
      ConversionError: If the weights are not there; says where to get them.
    """
    path = Path(args.samples)
    images = open_images(path)
    out = Path(args.out) if args.out else path.with_name(f"{path.stem}.scores.json")
    scorer, inception = make_scorer(args.reference, args.inception, args.batch, args.resize)
    metrics = args.metrics.split(",") if args.metrics else None
    result = score_to_file(
        scorer, inception, images, metrics, out, allow_constant=args.allow_constant
    )
    if not is_primary():
        return
    print(f"{path}: {images.shape[0]} images against {args.reference}")
    _print_scores(result.scores)
    for name, problem in result.skipped.items():
        print(f"  {name:24} left out: {problem}")
    for warning in result.warnings:
        print(f"warning: {warning}")
    print(f"written to {out}")


def score_to_file(
    scorer: Scorer,
    inception: dict[str, Any],
    images: ImageSet,
    metrics: list[str] | None,
    out: Path,
    *,
    allow_constant: bool = False,
) -> Result:
    """Scores images and writes numbers, recipe and provenance to a JSON file.

    Args:
      scorer: From `make_scorer`.
      inception: The weights' record, likewise.
      images: The samples.
      metrics: Names, or None for those that the reference allows.
      out: The file; what a stopped pass goes on from lies beside it meanwhile.
      allow_constant: Takes images of a single colour, too.

    Raises:
      EvaluationError: If samples, reference and metrics do not fit.
    """
    folder = out.with_name(f"{out.name}.parts")
    result = scorer.score(images, metrics, folder=folder, allow_constant=allow_constant)
    if is_primary():
        reference = scorer.reference
        about = {
            "file": reference.path.name,
            "statistics": sorted(reference.statistics),
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
            "inception": inception,
            "provenance": provenance(),
        }
        write_json(out, content)
    return result


def make_scorer(
    reference: str, inception: str, batch: int, resize: str
) -> tuple[Scorer, dict[str, Any]]:
    """Reads reference and weights; returns the scorer, and the weights' record."""
    opened = open_reference(reference)
    network, params, record = load_inception(inception)
    extractor = Extractor(network, params, make_mesh(MeshShape()), batch, resize)
    return Scorer(extractor, record["params_digest"], opened, _Report()), record


class _Report:
    """Says every few seconds how far a pass is."""

    def __init__(self) -> None:
        self._said = monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if done == total or monotonic() - self._said >= _REPORT_SECONDS:
            self._said = monotonic()
            say(f"features of {what}: {done}/{total}")


def judge(args: argparse.Namespace) -> None:
    """Scores samples with a classifier and writes the result.

    Raises:
      EvaluationError: If the samples do not fit.
    """
    source = args.judge or "digits"
    samples = open_samples(args.samples)
    scores = score_with_judge(samples, source)
    out = Path(args.out) if args.out else samples.path.with_suffix(f".judge-{source}.json")
    write_json(out, {"scores": scores, "samples": samples.describe(), "provenance": provenance()})
    print(f"{samples.path}: {samples.shape[0]} images")
    _print_scores(scores)
    print(f"written to {out}")


def _print_scores(scores: dict[str, Any]) -> None:
    for name, value in scores.items():
        print(f"  {name:24} {value:.5g}" if isinstance(value, float) else f"  {name:24} {value}")


def score_with_judge(samples: SampleFile, source: str) -> dict[str, Any]:
    """Scores samples with a classifier trained on the training split of a data source.

    Args:
      samples: The samples, with labels.
      source: Name of a bundled data source, read at the samples' size.

    Raises:
      EvaluationError: If the samples do not fit.
      DataError: If the source cannot be read at the samples' size.
    """
    labels = samples.require_labels(f"the judge {source!r}")
    images = samples.images()
    check_levels(images, samples.path)
    _, height, _, channels = samples.shape
    train, heldout = (
        read_all(make_source(source, split=split, image_size=height, channels=channels))
        for split in ("train", "heldout")
    )
    return judge_samples(images, labels, train, heldout)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dsr_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("samples", help="an .npz, or with --reference also a folder of PNG files")
    add("--reference", help="ADM reference, file of tools/make_reference.py, images")
    add("--inception", help="folder of converted weights")
    add("--metrics", help=f"of {','.join(METRICS)}; default: fid,sfid,is,pr as far as possible")
    add("--batch", type=int, default=64, help="images at a time over all devices")
    add("--resize", default="adm", choices=RESIZES, help="how images become 299 pixels wide")
    add("--allow-constant", action="store_true", help="score images of a single colour, too")
    add(
        "--judge",
        choices=["digits"],
        help="data whose real images train the classifier that judges the samples; the default "
        "without --reference",
    )
    add("--out", help="the scores' file; default: beside the samples")
    return parser


if __name__ == "__main__":
    cli.run_main(main)
