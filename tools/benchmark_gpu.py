"""Times training, sampling and an encoder beside PyTorch on the GPU of this machine.

    python tools/benchmark.py gpu [ROW ...] [--size XL] [--json FILE]
    python tools/benchmark.py gpu --platform=cpu --size=tiny  # a dry run without a GPU

Matmuls are in bfloat16 on both sides; PyTorch runs under `torch.compile` and autocast. Each side of
a row is a process of its own, which has the whole GPU. The rows:

    train        training step: loss, backward, AdamW, EMA; LightningDiT with registers on latents,
                 config.model.remat=auto
    sample       50 points of Euler's method with guidance 1.5
    encoder      SigLIP2-B's tokens of a batch of images, beside transformers'
    ttr          the same with the published test-time registers, beside transformers' without
    train-bf16   train with config.precision.residual=bfloat16
    sample-bf16  sample with config.precision.residual=bfloat16

Both sides have the same weights and inputs. Before they are timed, each computes what must agree:
the losses of two training steps, samples, tokens. A row whose sides differ by more than bfloat16's
error is not printed, and the exit status is 2. Any key of our config can be set, to measure a row
with and without it, as in --config.model.kernels=triton.

Everything together takes --minutes at most. Where they are short, there are fewer rounds; rows that
no time is left for are named. What was measured is written to --json after each process.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsr_jax.config import apply_overrides, base_config
from dsr_jax.core.cli import make_parser
from dsr_jax.core.errors import ConfigError, NumericsError
from dsr_jax.core.files import read_json, write_json
from dsr_jax.core.provenance import provenance
from dsr_jax.telemetry.flops import mfu
from tools.benchmark_gpu_checks import DRY_RUN, check_machine

ROWS: Mapping[str, str] = {
    "train": "train",
    "sample": "sample",
    "encoder": "encoder",
    "ttr": "encoder",
    "train-bf16": "train",
    "sample-bf16": "sample",
}
"""PyTorch's side of each row, which rows share."""
SIDES = ("dsr_jax", "torch")
SIZES = ("S", "B", "L", "XL", "tiny")
TOLERANCE: Mapping[str, float] = {"train": 5e-3, "sample": 5e-2, "encoder": 5e-2}
"""Largest accepted difference by PyTorch's side: of losses relative to the loss, of arrays as root
mean square relative to theirs. Rounding to bfloat16 is 2^-9 of a value at most, in each of 28
blocks."""
ROUND_SECONDS = 2.0
_ROOT = Path(__file__).resolve().parent.parent


def make_parser_gpu() -> argparse.ArgumentParser:
    """Returns the parser of `tools/benchmark.py gpu`."""
    parser = make_parser(__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"{', '.join(ROWS)}; default: all")
    parser.add_argument("--size", choices=SIZES, default="XL", help="size of the DiT")
    parser.add_argument("--batch", type=int, default=128, help="images of a training step")
    parser.add_argument("--images", type=int, default=64, help="images sampled or encoded at once")
    parser.add_argument("--rounds", type=int, default=5, help="rounds at most; the fastest counts")
    parser.add_argument(
        "--calls",
        type=int,
        default=0,
        help=f"calls of a round; default: as many as take {ROUND_SECONDS:g} s",
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="longest time of everything")
    parser.add_argument("--remat", default="", help="config.model.remat; default: auto")
    parser.add_argument("--platform", choices=("gpu", "cpu"), default="gpu", help="cpu: a dry run")
    parser.add_argument("--json", type=Path, help="file for all figures")
    # For the processes that this command starts.
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str]) -> None:
    """Runs the command line after `gpu`.

    Raises:
      ConfigError: If there is no such row, or this machine lacks what one of the sides needs.
      NumericsError: If rows were not measured, or both sides do not compute the same.
    """
    args, args.overrides = make_parser_gpu().parse_known_args(argv)
    apply_overrides(base_config(), args.overrides)
    if unknown := [row for row in args.rows if row not in ROWS]:
        raise ConfigError(f"{unknown[0]!r} is no row", f"choose from {', '.join(ROWS)}")
    if args.side:
        _run_side(args)
        return
    end = time.time() + 60 * args.minutes
    if args.platform == "gpu":
        check_machine(any(ROWS[row] == "encoder" for row in args.rows or ROWS))
    elif args.size != "tiny":
        raise ConfigError(
            f"--platform=cpu with --size={args.size} would take hours",
            f"leave out --platform on a machine with a GPU, or try: {DRY_RUN}",
        )
    with tempfile.TemporaryDirectory() as folder:
        benchmark = _Benchmark(args, argv, Path(folder), end)
        try:
            benchmark.run()
        finally:
            print(table(benchmark.figures))
            for row, problem in benchmark.problems.items():
                print(f"{row}: not measured: {problem}")
    if benchmark.problems:
        raise NumericsError(
            f"no figures for {', '.join(benchmark.problems)}", "see the lines above"
        )


class _Benchmark:
    """Runs the sides of rows one after the other.

    Attributes:
      figures: Figures of both sides by row, of rows whose sides agree.
      problems: What is wrong with the others.

    Args:
      args: The command line.
      argv: Its words, for the processes.
      folder: For weights, inputs and results.
      end: Time at which everything has to be done.
    """

    def __init__(
        self, args: argparse.Namespace, argv: Sequence[str], folder: Path, end: float
    ) -> None:
        self.figures: dict[str, Any] = {}
        self.problems: dict[str, str] = {}
        self._args, self._folder, self._end = args, folder, end
        self._options = [word for word in argv if word not in args.rows]
        self._sides: dict[tuple[str, str], dict[str, Any]] = {}
        self._compared: set[str] = set()
        self._rows = list(dict.fromkeys(args.rows or ROWS))

    def run(self) -> None:
        """Runs all rows."""
        for row in self._rows:
            try:
                sides = [self._side(row, "dsr_jax"), self._side(ROWS[row], "torch")]
                self.figures[row] = compare(row, *sides)
            except (NumericsError, TimeoutError, ChildProcessError) as error:
                self.problems[row] = str(error)
                _log(f"{row}: {error}")
            self._save()

    def _side(self, row: str, side: str) -> dict[str, Any]:
        """Returns the figures of one side, which runs in a process of its own unless it has."""
        if (row, side) not in self._sides:
            self._start(row, side)
            path = self._folder / f"{row}-{side}"
            figures = dict(read_json(path.with_suffix(".json")))
            self._sides[row, side] = figures | {"results": np.load(path.with_suffix(".npy"))}
            self._save()
        return self._sides[row, side]

    def _start(self, row: str, side: str) -> None:
        """Runs one side; what it measured before its time was over counts.

        Raises:
          TimeoutError: If there is no time, or nothing was measured in it.
          ChildProcessError: If it fails.
        """
        left = self._end - time.time()
        if left <= 0:
            raise TimeoutError(f"no time was left; give more --minutes than {self._args.minutes:g}")
        _log(f"{row}: {side}, {left:.0f} s left")
        command = [sys.executable, str(_ROOT / "tools" / "benchmark.py"), "gpu", row]
        command += [*self._options, f"--side={side}", f"--folder={self._folder}"]
        command += [f"--until={time.time() + left / self._processes_left():.3f}"]
        status = _run_group(command, _environment(self._args.platform, self._folder), left)
        measured = (self._folder / f"{row}-{side}.json").is_file()
        if status is None and not measured:
            raise TimeoutError(f"{side} was not done in time; give more --minutes")
        if status:
            raise ChildProcessError(f"{side} failed with exit status {status}; see above")

    def _processes_left(self) -> int:
        """Returns the number of processes that have not run, this one included."""
        wanted = {(row, "dsr_jax") for row in self._rows}
        wanted |= {(ROWS[row], "torch") for row in self._rows}
        return max(len(wanted - self._sides.keys()), 1)

    def _save(self) -> None:
        """Writes everything so far; also sides that have nothing to be compared with yet."""
        args = self._args
        if not args.json:
            return
        done = {(row, "dsr_jax") for row in self.figures}
        done |= {(ROWS[row], "torch") for row in self.figures}
        unchecked = {
            f"{row} {side}": {k: v for k, v in figures.items() if k != "results"}
            for (row, side), figures in self._sides.items()
            if (row, side) not in done
        }
        keys = ("size", "batch", "images", "platform", "overrides")
        settings = {key: getattr(args, key) for key in keys}
        content = {"environment": provenance(), **settings, "rows": self.figures}
        write_json(args.json, content | {"not_measured": self.problems, "unchecked": unchecked})


def _environment(platform: str, folder: Path) -> dict[str, str]:
    """Returns the environment of a side's process.

    XLA's choices of matmul kernels go into a folder, where the next process finds them.
    """
    if platform == "cpu":
        return os.environ | {"JAX_PLATFORMS": "cpu"}
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "jax")}
    return cache | os.environ | {"JAX_PLATFORMS": "cuda"}


def _run_group(command: Sequence[str], environment: dict[str, str], seconds: float) -> int | None:
    """Runs a command for so many seconds at most; returns its status, None where it was ended.

    It ends with the processes that it started, as torch.compile does, and also if this one is
    interrupted.
    """
    process = subprocess.Popen(command, env=environment, stdout=2, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _run_side(args: argparse.Namespace) -> None:
    """Runs one side of one row; leaves figures and what must agree in the folder."""
    row = args.rows[0]
    path = args.folder / f"{row}-{args.side}"
    if args.side == "dsr_jax":
        from tools.benchmark_gpu_jax import prepare
    else:
        from tools.benchmark_gpu_torch import prepare
    start = time.perf_counter()
    side = prepare(row, args)
    np.save(path.with_suffix(".npy"), side.results)
    measure(side, args, path.with_suffix(".json"), time.perf_counter() - start)


def measure(side: Any, args: argparse.Namespace, path: Path, prepared: float) -> None:
    """Times a side; its file of figures is there after the first round, and then renewed.

    Args:
      side: The side, a `benchmark_gpu_side.Side`.
      args: The command line.
      path: File of the figures.
      prepared: Seconds that the side took until it was ready.
    """
    one = _seconds(side.call, 1, side.wait)
    calls = args.calls or max(1, min(20, round(ROUND_SECONDS / max(one, 1e-6))))
    rounds: list[float] = []
    while not rounds or (len(rounds) < args.rounds and time.time() < args.until):
        rounds.append(_seconds(side.call, calls, side.wait))
        figures = {"seconds": min(rounds), "rounds": rounds, "calls": calls}
        write_json(path, figures | {"prepared_seconds": prepared} | side.figures())


def _seconds(call: Callable[[], Any], calls: int, wait: Callable[[Any], object]) -> float:
    """Returns the seconds of a call; the device is waited for after the last one."""
    start = time.perf_counter()
    for _ in range(calls):
        result = call()
    wait(result)
    return (time.perf_counter() - start) / calls


def compare(row: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the figures of both sides.

    Raises:
      NumericsError: If their results differ by more than TOLERANCE.
    """
    kind = ROWS[row]
    error = relative_error(kind, *(side["results"].astype(np.float64) for side in (ours, theirs)))
    if not error <= TOLERANCE[kind]:
        raise NumericsError(
            f"the sides differ by {error:.1e} (at most {TOLERANCE[kind]:.0e})",
            "timings of different computations cannot be compared; find the difference",
        )
    ours, theirs = ({k: v for k, v in side.items() if k != "results"} for side in (ours, theirs))
    # Both sides count the same FLOPs for the same work.
    sides = {"dsr_jax": ours, "torch": {**theirs, "flops": ours["flops"]}}
    for figures in sides.values():
        figures["mfu"] = mfu(figures["flops"], figures["seconds"], 1, figures["device"])
    return {"error": error, "torch_over_dsr_jax": theirs["seconds"] / ours["seconds"], **sides}


def relative_error(kind: str, got: np.ndarray, want: np.ndarray) -> float:
    """Returns the error that TOLERANCE bounds; infinite for values that are not finite."""
    if got.shape != want.shape or not (np.isfinite(got).all() and np.isfinite(want).all()):
        return float("inf")
    if kind == "train":
        return float(np.max(np.abs(got - want) / np.abs(want)))
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


def table(figures: Mapping[str, Any]) -> str:
    """Returns the figures as text, one line per row and side."""
    lines = [
        f"{'row':13}{'side':9}{'seconds':>9}{'images/s':>10}{'MFU':>7}{'peak, GiB':>11}"
        f"{'ready, s':>10}{'remat':>7}{'torch / ours':>14}"
    ]
    for row, sides in figures.items():
        for side in SIDES:
            one = sides[side]
            used = "" if one["mfu"] is None else f"{one['mfu']:.1%}"
            peak = one["peak_bytes"]
            memory = "" if peak is None else f"{peak / 2**30:.1f}"
            ratio = f"{sides['torch_over_dsr_jax']:.2f}" if side == "dsr_jax" else ""
            lines.append(
                f"{row:13}{side:9}{one['seconds']:9.4f}{one['images'] / one['seconds']:10.1f}"
                f"{used:>7}{memory:>11}{one['prepared_seconds']:10.1f}{one.get('remat', ''):>7}"
                f"{ratio:>14}".rstrip()
            )
    return "\n".join(lines)


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
