"""Scores a file of samples and writes the numbers, with their recipe, beside it.

    python -m dsr_jax.evaluate runs/digits/samples/NAME.npz --judge digits

Any `.npz` with `arr_0` (uint8, [N, H, W, C]) and `labels` will do, also of other programs.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsr_jax.core import cli
from dsr_jax.core.files import write_json
from dsr_jax.core.provenance import provenance
from dsr_jax.data.sources import make_source, read_all
from dsr_jax.evaluation.judge import judge_samples
from dsr_jax.evaluation.samples import SampleFile, check_levels, open_samples


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    args = _parser().parse_args(argv)
    samples = open_samples(args.samples)
    scores = score_with_judge(samples, args.judge)
    out = Path(args.out) if args.out else samples.path.with_suffix(f".judge-{args.judge}.json")
    write_json(
        out,
        {
            "scores": scores,
            "samples": {
                "file": samples.path.name,
                "digest": samples.digest(),
                "record": samples.recipe(),
            },
            "provenance": provenance(),
        },
    )
    print(f"{samples.path}: {samples.shape[0]} images")
    for name, value in scores.items():
        print(f"  {name:24} {value:.5g}" if isinstance(value, float) else f"  {name:24} {value}")
    print(f"written to {out}")


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
    parser.add_argument("samples", help="the .npz")
    parser.add_argument(
        "--judge",
        default="digits",
        choices=["digits"],
        help="data whose real images train the classifier that judges the samples",
    )
    parser.add_argument("--out", help="the scores' file; default: beside the samples")
    return parser


if __name__ == "__main__":
    cli.run_main(main)
