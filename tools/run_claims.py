"""Tries the paper's claims on real digits, with encoders small enough for a laptop.

    python tools/run_claims.py --out=runs/claims [--seeds=3] [--quick]

Trains a tiny ViT encoder by masking; plants register neurons into a copy of it, so that outlier
tokens appear and the other patches keep their content; finds those neurons by the search; trains a
decoder for each encoder; and trains the same small denoiser on the latents of (a) the clean
encoder, (b) the one with outliers, (c) as b with the outliers' loss masked, (d) as b with test-time
registers, (e) as d with diffusion registers. Prints a table, and which claims hold at this scale;
OUT/claims.md and claims.json keep them, OUT/claims.png shows samples of each kind from the same
noise. The same command continues what was stopped.

This is an experiment, not a test: it reports what comes out.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dsr_jax.core.cli import make_parser, run_main
from dsr_jax.parallel.processes import start_processes
from tools.claims.arms import ARMS, run_arm
from tools.claims.report import draw_claims, write_claims
from tools.claims.stages import QUICK, Sizes, make_stages


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is made")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--quick", action="store_true", help="a few steps: shows that it runs")
    args = parser.parse_args(argv)
    start_processes()
    sizes, folder = QUICK if args.quick else Sizes(), args.out / "stages"
    stages = make_stages(folder, sizes)
    scores: dict[str, list] = {arm: [] for arm in ARMS}
    # By seed first, so that an unfinished experiment compares all kinds.
    for seed in range(args.seeds):
        for arm in ARMS:
            run = args.out / f"{arm}_{seed}"
            scores[arm].append(run_arm(run, folder, arm, seed, sizes, stages["limit"]["norm"]))
        print(write_claims(args.out, stages, scores))
        draw_claims(args.out)


if __name__ == "__main__":
    run_main(main)
