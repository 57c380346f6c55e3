"""Compares score files, and fails if their recipes differ.

    python tools/compare_scores.py runs/*/samples/*.scores.json --plot fid.png

The files are written by python -m dsr_jax.evaluate --reference. Weights, reference, resize,
rounding, counts and balance of labels must agree; --force compares anyway and prints what differs.
"""

import argparse
import sys
from collections.abc import Sequence

from dsr_jax.core.cli import make_parser, run_main
from dsr_jax.core.files import write_atomic
from dsr_jax.evaluation.comparison import (
    as_csv,
    as_text,
    check_comparable,
    differences,
    make_table,
    plot_guidance,
    read_scores,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Compares the files that the command line names; see the module's docstring."""
    args = _parser().parse_args(argv)
    files = [read_scores(path) for path in args.scores]
    differing = differences(files)
    if not args.force:
        check_comparable(files)
    rows = make_table(files)
    print(as_text(rows))
    note = f"NOT COMPARABLE, differing {', '.join(differing)}" if differing else ""
    if note:
        print(note)
    for package in sorted({name for each in files for name in each.packages}):
        versions = {each.packages.get(package, "absent") for each in files}
        if len(versions) > 1:
            print(f"note: {package} in versions {', '.join(sorted(versions))}", file=sys.stderr)
    if args.csv:
        write_atomic(args.csv, as_csv(rows))
    if args.plot:
        print(f"{plot_guidance(files, args.plot, note)} points: {args.plot}")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("scores", nargs="+", help="score files")
    add("--force", action="store_true", help="compare even if recipes differ")
    add("--csv", help="write the table to this file")
    add("--plot", help="plot FID against guidance into this file")
    return parser


if __name__ == "__main__":
    run_main(main)
