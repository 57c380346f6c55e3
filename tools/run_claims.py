"""Tests the paper's claims on real digits, with encoders small enough for a laptop.

    python tools/run_claims.py --out=runs/claims [--seeds=3] [--quick]

Trains a tiny ViT encoder by masked autoencoding; plants register neurons into a copy of it, so that
outlier tokens appear while the other patches keep their content; finds those neurons with the
search; trains a decoder for each encoder; and trains the same small denoiser on the latents of (a)
the clean encoder, (b) the encoder with outliers, (c) as b with the outliers' loss masked, (d) as b
with test-time registers, (e) as d with diffusion registers. Prints a table and which claims hold at
this scale, and writes both to OUT/claims.md and OUT/claims.json. OUT/claims.png shows samples of
each kind from the same noise, and OUT/outliers.html shows the tokens of the first seed's denoisers.
The same command continues an interrupted experiment.

This is an experiment, not a test: it reports its outcome and fails on none.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dsr_jax.core.cli import make_parser, run_main
from dsr_jax.parallel.processes import start_processes
from tools import inspect_outliers
from tools.claims.arms import ARMS, run_arm
from tools.claims.report import plot_claims, write_claims
from tools.claims.stages import QUICK, Sizes, make_stages


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for all results")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each kind")
    parser.add_argument("--quick", action="store_true", help="train for a few steps only")
    args = parser.parse_args(argv)
    start_processes()
    sizes, folder = QUICK if args.quick else Sizes(), args.out / "stages"
    stages = make_stages(folder, sizes)
    scores: dict[str, list] = {arm: [] for arm in ARMS}
    # Seeds in the outer loop, so that an unfinished experiment compares all kinds.
    for seed in range(args.seeds):
        for arm in ARMS:
            run = args.out / f"{arm}_{seed}"
            scores[arm].append(run_arm(run, folder, arm, seed, sizes, stages["limit"]["norm"]))
        print(write_claims(args.out, stages, scores))
        plot_claims(args.out)
    first, *others = (str(args.out / f"{arm}_0") for arm in ARMS)
    page = f"--out={args.out / 'outliers.html'}"
    inspect_outliers.main([f"--workdir={first}", page, "--compare", *others])


if __name__ == "__main__":
    run_main(main)
