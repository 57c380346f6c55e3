"""Scores samples and writes the scores, with their recipe, to a file.

    python -m dsr_jax.evaluate samples.npz --reference ref.npz --inception DIR --out scores.json
    python -m dsr_jax.evaluate runs/digits/samples/NAME.npz --classifier digits

Samples are an `.npz` with `arr_0` (uint8, [N, H, W, C]; `labels` where the class matters), or a
folder of PNG files, of any program. With a reference the scores are FID, sFID, Inception Score,
precision and recall as the ADM evaluator defines them, KID, and the Frechet distance of DINOv2's
features; --inception and --dinov2 are folders that `python -m dsr_jax.convert` wrote. The same
command continues a stopped one, also on other devices; on several hosts all of them must see the
files.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsr_jax.core import cli
from dsr_jax.core.errors import EvaluationError
from dsr_jax.core.files import write_json
from dsr_jax.core.provenance import provenance
from dsr_jax.evaluation.image_sets import open_images
from dsr_jax.evaluation.metric import needs_of
from dsr_jax.evaluation.metrics import DEFAULT, METRICS, find_metrics
from dsr_jax.evaluation.passes import SAVE_EVERY
from dsr_jax.evaluation.samples import open_samples
from dsr_jax.models.inception_input import RESIZES
from dsr_jax.parallel.processes import is_process_zero, lock_folder
from dsr_jax.parallel.watch import join_job
from dsr_jax.runs.scoring import (
    check_output,
    make_scorer,
    score_to_file,
    score_with_classifier,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    args = _parser().parse_args(argv)
    path = Path(args.samples)
    if args.reference is None:
        if path.is_dir() or args.inception or args.dinov2 or args.metrics:
            raise EvaluationError(
                f"{path} is to be compared with a reference, and none is named",
                "add --reference: an ADM reference, a file of tools/make_reference.py, or images; "
                "without it, an .npz with labels is scored by --classifier digits",
            )
        classify(args)
        return
    if args.classifier:
        raise EvaluationError(
            "--classifier scores without --reference", "leave one of both out of the command line"
        )
    needs = needs_of(find_metrics(args.metrics or DEFAULT))
    if needs - {"images", "labels"} and not (args.inception or args.dinov2):
        raise EvaluationError(
            "these metrics need --inception or --dinov2",
            "name the folder that python -m dsr_jax.convert inception wrote",
        )
    compare(args)


@join_job()
def compare(args: argparse.Namespace) -> None:
    """Scores samples against a reference and writes the result.

    Raises:
      EvaluationError: If samples, reference and metrics do not fit.
      LockError: If another command writes the same scores.
      ConversionError: If the weights are missing, with where to get them.
    """
    path = Path(args.samples)
    images = open_images(path)
    out = args.out or path.with_name(f"{path.stem}.scores.json")
    # What files tell is checked before weights are read.
    check_output(out, images, args.reference)
    with lock_folder(out.parent, out.name):
        scorer = make_scorer(args.reference, args.inception, args.dinov2, args.batch, args.resize)
        result = score_to_file(
            scorer,
            images,
            args.metrics,
            out,
            allow_constant=args.allow_constant,
            save_every=args.save_every,
        )
    if not is_process_zero():
        return
    print(f"{path}: {images.shape[0]} images against {args.reference}")
    _print_scores(result.scores)
    for name, problem in result.skipped.items():
        print(f"  {name:24} left out: {problem}")
    for warning in result.warnings:
        print(f"warning: {warning}")
    print(f"written to {out}")


@join_job()
def classify(args: argparse.Namespace) -> None:
    """Scores samples with a classifier and writes the result, on process 0 alone.

    Raises:
      EvaluationError: If the samples do not fit.
    """
    if not is_process_zero():
        return
    source = args.classifier or "digits"
    samples = open_samples(args.samples)
    out = args.out or samples.path.with_suffix(f".classifier-{source}.json")
    check_output(out, samples)
    scores = score_with_classifier(samples, source)
    write_json(out, {"scores": scores, "samples": samples.describe(), "provenance": provenance()})
    print(f"{samples.path}: {samples.shape[0]} images")
    _print_scores(scores)
    print(f"written to {out}")


def _print_scores(scores: dict[str, Any]) -> None:
    for name, value in scores.items():
        print(f"  {name:24} {value:.5g}" if isinstance(value, float) else f"  {name:24} {value}")


def _parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, "python -m dsr_jax.evaluate")
    add = parser.add_argument
    add("samples", help="an .npz, or with --reference also a folder of PNG files")
    add("--reference", help="ADM reference, file of tools/make_reference.py, images")
    add("--inception", help="folder of converted weights")
    add("--dinov2", help="folder of a converted DINOv2 with its class output, for fd_dinov2")
    add(
        "--metrics",
        type=lambda text: [name.strip() for name in text.split(",")],
        help=f"of {','.join(METRICS)}, or package.module:Class; default: those of "
        f"{','.join(DEFAULT)} that the reference allows",
    )
    add("--batch", type=cli.positive_int, default=64, help="images per step, over all devices")
    add("--resize", default="adm", choices=RESIZES, help="how images are resized to 299 pixels")
    add(
        "--save-every",
        type=cli.positive_int,
        default=SAVE_EVERY,
        help="images between two saves of an unfinished pass",
    )
    add("--allow-constant", action="store_true", help="also accept images of a single color")
    add(
        "--classifier",
        "--judge",
        choices=["digits"],
        help="data set whose real images train the classifier of the samples; default without "
        "--reference: digits",
    )
    add("--out", type=Path, help="score file; default: next to the samples")
    return parser


if __name__ == "__main__":
    cli.run_main(main)
