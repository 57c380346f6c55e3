"""Times training, sampling and an encoder beside PyTorch on the GPU of this machine.

    python tools/benchmark.py gpu [ROW ...] [--size XL] [--json FILE]
    python tools/benchmark.py gpu --platform=cpu --size=tiny  # a dry run without a GPU

Matmuls are in bfloat16 on both sides; PyTorch runs under `torch.compile` and autocast. Each side of
each row is a process of its own, which has the whole GPU. The rows:

    train    training step: loss, backward, AdamW, EMA; LightningDiT with registers on latents
    sample   50 points of Euler's method with guidance 1.5
    encoder  SigLIP2-B's tokens of a batch of images, beside transformers'
    ttr      the same with the published test-time registers, beside transformers' without

Both sides have the same weights and inputs. Before they are timed, each computes what must agree:
the losses of two training steps, samples, tokens. A row whose sides differ by more than bfloat16's
error is not printed, and the exit status is 2. Rows that --minutes leaves no time for are named.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsr_jax.core.cli import make_parser
from dsr_jax.core.errors import ConfigError, NumericsError
from dsr_jax.core.files import read_json, write_json
from dsr_jax.core.provenance import provenance
from dsr_jax.telemetry.flops import mfu

ROWS = ("train", "sample", "encoder", "ttr")
SIDES = ("dsr_jax", "torch")
SIZES = ("S", "B", "L", "XL", "tiny")
TOLERANCE: Mapping[str, float] = {"train": 5e-3, "sample": 5e-2, "encoder": 5e-2, "ttr": 5e-2}
"""Largest accepted difference: of losses relative to the loss, of arrays as root mean square
relative to theirs. Rounding to bfloat16 is 2^-9 of a value at most, in each of 28 blocks."""
_ROOT = Path(__file__).resolve().parent.parent


def make_parser_gpu() -> argparse.ArgumentParser:
    """Returns the parser of `tools/benchmark.py gpu`."""
    parser = make_parser(__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"{', '.join(ROWS)}; default: all")
    parser.add_argument("--size", choices=SIZES, default="XL", help="size of the DiT")
    parser.add_argument("--batch", type=int, default=128, help="images of a training step")
    parser.add_argument("--images", type=int, default=64, help="images sampled or encoded at once")
    parser.add_argument("--calls", type=int, default=10, help="timed calls of a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the fastest counts")
    parser.add_argument("--minutes", type=float, default=8.0, help="longest time of everything")
    parser.add_argument("--residual", default="", help="config.precision.residual; default: its")
    parser.add_argument("--remat", default="", help="config.model.remat; default: its")
    parser.add_argument("--platform", choices=("gpu", "cpu"), default="gpu", help="cpu: a dry run")
    parser.add_argument("--json", type=Path, help="file for all figures")
    # For the processes that this command starts.
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str]) -> None:
    """Runs the command line after `gpu`.

    Raises:
      ConfigError: If there is no such row, or no GPU for one of the sides.
      NumericsError: If both sides of a row do not compute the same.
    """
    args = make_parser_gpu().parse_args(argv)
    if unknown := [row for row in args.rows if row not in ROWS]:
        raise ConfigError(f"{unknown[0]!r} is no row", f"choose from {', '.join(ROWS)}")
    if args.side:
        _run_side(args)
        return
    _check_device(args)
    rows, end = args.rows or list(ROWS), time.monotonic() + 60 * args.minutes
    figures: dict[str, Any] = {}
    problems: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            try:
                sides = [_start(row, side, args, argv, Path(folder), end) for side in SIDES]
                figures[row] = _compare(row, *sides)
            except (NumericsError, TimeoutError, ChildProcessError) as error:
                problems[row] = str(error)
                _log(f"{row}: {error}")
            _save(args, figures, problems)
    print(_table(figures))
    for row, problem in problems.items():
        print(f"{row}: not measured: {problem}")
    if problems:
        raise NumericsError(f"no figures for {', '.join(problems)}", "see the lines above")


def _check_device(args: argparse.Namespace) -> None:
    """Checks, in a process of its own, that both libraries see a GPU."""
    if args.platform == "cpu":
        if args.size != "tiny":
            raise ConfigError(
                f"--platform=cpu with --size={args.size} would take hours",
                "add --size=tiny for a dry run, or leave out --platform on a machine with a GPU",
            )
        return
    probes = {
        "jax": "import jax; assert jax.devices()[0].platform == 'gpu'",
        "torch": "import torch; assert torch.cuda.is_available()",
    }
    remedies = {"jax": "pip install 'dsr_jax[cuda]'", "torch": "a PyTorch built for CUDA"}
    for name, code in probes.items():
        probe = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"JAX_PLATFORMS": "cuda"},
            capture_output=True,
        )
        if probe.returncode:
            raise ConfigError(
                f"{name} sees no GPU on this machine",
                f"install {remedies[name]} and NVIDIA's driver, or try the command without one: "
                "python tools/benchmark.py gpu --platform=cpu --size=tiny",
            )


def _start(
    row: str, side: str, args: argparse.Namespace, argv: Sequence[str], folder: Path, end: float
) -> dict[str, Any]:
    """Runs one side of a row in a process of its own, and returns its figures."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"no time was left; give more --minutes than {args.minutes:g}")
    _log(f"{row}: {side}, {left:.0f} s left")
    options = [text for text in argv if text not in args.rows]
    command = [sys.executable, str(_ROOT / "tools" / "benchmark.py"), "gpu", row, *options]
    command += [f"--side={side}", f"--folder={folder}"]
    platforms = {"gpu": "cuda", "cpu": "cpu"}
    environment = os.environ | {"JAX_PLATFORMS": platforms[args.platform]}
    try:
        done = subprocess.run(command, env=environment, timeout=left, stdout=sys.stderr)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{side} was not done in time; give more --minutes") from None
    if done.returncode:
        raise ChildProcessError(f"{side} failed with exit status {done.returncode}; see above")
    return dict(read_json(folder / f"{row}-{side}.json"))


def _run_side(args: argparse.Namespace) -> None:
    """Runs one side of one row, and leaves figures and what must agree in the folder."""
    row = args.rows[0]
    if args.side == "dsr_jax":
        from tools.benchmark_gpu_jax import run
    else:
        from tools.benchmark_gpu_torch import run
    figures, results = run(row, args)
    np.save(args.folder / f"{row}-{args.side}.npy", results)
    path = args.folder / f"{row}-{args.side}"
    write_json(path.with_suffix(".json"), figures | {"results": str(path.with_suffix(".npy"))})


def _compare(row: str, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of both sides.

    Raises:
      NumericsError: If their results differ by more than TOLERANCE.
    """
    got, want = (np.load(side.pop("results")).astype(np.float64) for side in (ours, theirs))
    error = relative_error(row, got, want)
    if not error <= TOLERANCE[row]:
        raise NumericsError(
            f"the sides differ by {error:.1e} (at most {TOLERANCE[row]:.0e})",
            "timings of different computations cannot be compared; find the difference",
        )
    ratio = theirs["seconds"] / ours["seconds"]
    return {"error": error, "torch_over_dsr_jax": ratio, "dsr_jax": ours, "torch": theirs}


def relative_error(row: str, got: np.ndarray, want: np.ndarray) -> float:
    """Returns the error that TOLERANCE bounds; infinite for values that are not finite."""
    if got.shape != want.shape or not (np.isfinite(got).all() and np.isfinite(want).all()):
        return float("inf")
    if row == "train":
        return float(np.max(np.abs(got - want) / np.abs(want)))
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


def _save(
    args: argparse.Namespace, figures: Mapping[str, Any], problems: Mapping[str, str]
) -> None:
    if args.json:
        settings = {key: getattr(args, key) for key in ("size", "batch", "images", "platform")}
        content = {"environment": provenance(), **settings, "rows": figures}
        write_json(args.json, content | {"not_measured": dict(problems)})


def _table(figures: Mapping[str, Any]) -> str:
    lines = [
        f"{'row':9}{'side':9}{'seconds':>10}{'images/s':>10}{'MFU':>7}{'peak, GiB':>11}"
        f"{'first, s':>10}{'torch / ours':>14}"
    ]
    for row, sides in figures.items():
        for side in SIDES:
            one = sides[side]
            used = mfu(one["flops"], one["seconds"], 1, one["device"])
            shown = "" if used is None else f"{used:.1%}"
            peak = one["peak_bytes"]
            memory = "" if peak is None else f"{peak / 2**30:.1f}"
            ratio = f"{sides['torch_over_dsr_jax']:.2f}" if side == "dsr_jax" else ""
            lines.append(
                f"{row:9}{side:9}{one['seconds']:10.4f}{one['images'] / one['seconds']:10.1f}"
                f"{shown:>7}{memory:>11}{one['first_seconds']:10.1f}{ratio:>14}"
            )
    return "\n".join(lines)


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
