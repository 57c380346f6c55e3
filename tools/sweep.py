"""Samples and scores a run over checkpoints, EMA decays, guidance scales and intervals.

    python tools/sweep.py --workdir runs/x --reference ready.npz --inception converted/inception \\
        --guidance 1.0 1.25 1.5 --ema 0.9999 --interval 0,1 0.1,0.9 --num-samples 10000 --out sweep

Every combination is sampled by python -m dsr_jax.sample and scored by python -m dsr_jax.evaluate.
The folder --out then contains samples, scores, table.csv and fid.png. The same command finishes an
interrupted sweep; with longer lists it adds to the sweep. Sampler settings are passed on, as in
`--method heun --num-points 51` or `--config.sample.seed=1`. With references written by
tools/make_reference.py, no score needs a pass over the reference's images.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dsr_jax import sample
from dsr_jax.core.cli import make_parser, positive_int, run_main
from dsr_jax.core.errors import EvaluationError
from dsr_jax.core.files import write_atomic
from dsr_jax.evaluation.comparison import as_csv, as_text, make_table, plot_guidance, read_scores
from dsr_jax.evaluation.image_sets import open_images
from dsr_jax.evaluation.metric import needs_of
from dsr_jax.evaluation.metrics import DEFAULT, find_metrics
from dsr_jax.evaluation.scoring import Scorer
from dsr_jax.parallel.processes import is_process_zero, log, start_processes
from dsr_jax.runs.scoring import make_scorer, score_to_file
from dsr_jax.training.checkpoints import list_steps


class Point(NamedTuple):
    """One combination of settings.

    Attributes:
      step: Step of the checkpoint.
      ema: EMA decay; "" for the run's own.
      guidance: Guidance scale.
      interval: Guidance interval "LOW,HIGH"; "" for the run's own.
    """

    step: int
    ema: str
    guidance: float
    interval: str

    @property
    def name(self) -> str:
        """Name of its files, without extensions."""
        interval = f"-in{self.interval.replace(',', 'to')}" if self.interval else ""
        return f"step{self.step:08d}-ema{self.ema or 'own'}-cfg{self.guidance:g}{interval}"

    def arguments(self) -> list[str]:
        """Returns its arguments for `python -m dsr_jax.sample`."""
        found = ["--checkpoint-step", str(self.step), "--guidance", str(self.guidance)]
        found += ["--ema", self.ema] if self.ema else []
        return found + (["--interval", self.interval] if self.interval else [])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the sweep that the command line names; see the module's docstring."""
    args, rest = _parser().parse_known_args(argv)
    start_processes()
    out = Path(args.out).expanduser()
    points = list(make_points(args, list_steps(Path(args.workdir).expanduser() / "checkpoints")))
    scorer = make_scorer(args.reference, args.inception, args.dinov2, args.batch)
    metrics = args.metrics.split(",") if args.metrics else None
    for number, point in enumerate(points):
        path = out / f"{point.name}.scores.json"
        if path.is_file():
            check_scored(path, scorer, metrics, args.num_samples)
            continue
        log(f"{number + 1}/{len(points)}: {point.name}")
        where = ["--workdir", args.workdir, "--out", str(out), "--name", point.name]
        count = ["--num-samples", str(args.num_samples)]
        sample.main([*where, *count, *point.arguments(), *rest])
        images = open_images(out / f"{point.name}.npz")
        score_to_file(scorer, images, metrics, path)
    if is_process_zero():
        show(out, points)


def make_points(args: argparse.Namespace, steps: Sequence[int]) -> Iterator[Point]:
    """Yields all combinations; without guidance, the interval has no effect and is omitted.

    Raises:
      EvaluationError: If the run has no checkpoints, or lacks a requested one.
    """
    if not steps:
        raise EvaluationError(
            f"{args.workdir} holds no checkpoints",
            "give the --workdir of a run of python -m dsr_jax.train that has saved",
        )
    chosen = args.steps or list(steps)[-1:]
    if missing := sorted(set(chosen) - set(steps)):
        raise EvaluationError(
            f"{args.workdir} holds no checkpoints of steps {', '.join(map(str, missing))}",
            f"choose --steps from {', '.join(map(str, steps))}",
        )
    combinations = itertools.product(chosen, args.ema, args.guidance, args.interval)
    yield from dict.fromkeys(
        Point(step, ema, scale, "" if scale == 1 else interval)
        for step, ema, scale, interval in combinations
    )


def check_scored(
    path: Path, scorer: Scorer, metrics: Sequence[str] | None, num_samples: int
) -> None:
    """Checks that an existing score file belongs to this sweep.

    Raises:
      EvaluationError: If its recipe differs; the message names the differing entries.
    """
    recipe = read_scores(path).recipe
    wanted = {
        **scorer.extractor.recipe(needs_of(find_metrics(metrics or DEFAULT))),
        "reference": scorer.reference.digest(),
        "num_samples": num_samples,
    }
    if differing := [key for key, value in wanted.items() if recipe.get(key) != value]:
        raise EvaluationError(
            f"{path} was computed with other {', '.join(differing)}", "name another --out"
        )


def show(out: Path, points: Sequence[Point]) -> None:
    """Prints the table, and writes table and plot to the folder."""
    files = [read_scores(out / f"{point.name}.scores.json") for point in points]
    rows = make_table(files)
    print(as_text(rows))
    write_atomic(out / "table.csv", as_csv(rows))
    if any("fid" in each.scores for each in files):
        plot_guidance(files, out / "fid.png", f"{files[0].recipe['num_samples']} samples")
    print(f"written to {out}")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--workdir", required=True, help="the run's folder")
    add("--reference", required=True, help="as in python -m dsr_jax.evaluate")
    add("--inception", required=True, help="folder of converted weights")
    add("--dinov2", help="folder of a converted DINOv2 with its class output, for fd_dinov2")
    add("--steps", nargs="+", type=int, default=[], help="checkpoints; default: the newest")
    add("--ema", nargs="+", default=[""], help="EMA decays, or none; default: the run's own")
    add("--guidance", nargs="+", type=float, default=[1.0], help="scales; default: 1.0, for none")
    add("--interval", nargs="+", default=[""], help="LOW,HIGH; default: the run's own")
    add("--num-samples", type=positive_int, default=10_000, help="images per combination")
    add("--metrics", help="as in python -m dsr_jax.evaluate")
    add("--batch", type=positive_int, default=64, help="images at a time through Inception")
    add("--out", required=True, help="folder of the sweep")
    return parser


if __name__ == "__main__":
    run_main(main)
