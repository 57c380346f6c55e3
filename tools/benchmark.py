"""Times our training step and sampler beside PyTorch's on this machine's CPU.

    python tools/benchmark.py [TASK ...] [--size S]
    python tools/benchmark.py inception inception-last fid pr

Both sides run alternately in one process, on the same weights and inputs in float32, with the same
number of threads; the ratio is the median over pairs of consecutive calls, so that other load on
the machine affects both. What is compared:

    train      one training step (sampling, loss, backward, AdamW, EMA) of a DiT with registers
    registers  our step with 36 registers beside our step without
    sample     10 Euler steps with classifier-free guidance
    encoder    SigLIP2-B on 8 images, beside transformers'
    ttr        the same with the published test-time registers, beside without
    input      reading 256 JPEG files that were prepared, beside torch's DataLoader on the files
    files      reading the same files, beside torch's DataLoader
    compile    seconds to compile the training step of the XL model, without running it
    inception  features of 32 images of 256 pixels by FID's Inception, beside PyTorch's
    inception-last  the same beside PyTorch with channels last, which the public ports do not use
    fid        FID from ready features, 50,000 x 2048, against a reference's moments
    pr         precision and recall from ready features, 10,000 x 2048 each, and the memory it takes

`python tools/benchmark.py gpu --help` is the same for a machine with a GPU.

Before both sides are timed, they must agree: outputs and loss within 5e-5 of the largest value,
parameters after a step within 2e-4. If they do not, nothing is printed and the exit status is 2.
"""

import argparse
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax

from dsr_jax.core.cli import make_parser, run_main
from dsr_jax.core.files import write_json
from dsr_jax.core.memory import keep_freed_memory
from dsr_jax.core.provenance import provenance
from tools import benchmark_gpu
from tools.benchmark_encoder import EncoderSides
from tools.benchmark_evaluation import (
    InceptionSides,
    make_frechet,
    make_precision_recall,
    peak_of_precision_recall,
)
from tools.benchmark_input import InputSides
from tools.benchmark_sides import (
    Ours,
    check_samples,
    check_training,
    make_config,
    make_samplers,
    make_torch_reference,
    make_trainer,
    torch_batch,
)

EVALUATION_TASKS = ("inception", "inception-last", "fid", "pr")
TASKS = (
    *("train", "registers", "sample", "encoder", "ttr", "input", "files", "compile"),
    *EVALUATION_TASKS,
)
NEED_TORCH = set(TASKS) - {"registers", "compile", "fid", "pr"}
INCEPTION_BATCH = 32
SIZES = ("S", "B", "L", "XL", "tiny")


class Timing(NamedTuple):
    """Seconds of one call: on the wall, and of CPU over all threads."""

    wall: float
    cpu: float


Timings = dict[str, list[Timing]]
"""Rounds by side; the first side is compared with the second."""


def measure(call: Callable[[], object]) -> Timing:
    """Returns the time of a call that blocks until its work is done."""
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    call()
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Timing(wall, cpu)


def time_alternately(calls: Mapping[str, Callable[[], object]], rounds: int, task: str) -> Timings:
    """Times each call in each of `rounds` rounds, after one untimed call of each."""
    for call in calls.values():
        call()
    timings: Timings = {name: [] for name in calls}
    for i in range(rounds):
        for name, call in calls.items():
            timings[name].append(measure(call))
        last = ", ".join(f"{name} {each[-1].wall:.2f} s" for name, each in timings.items())
        log(f"{task}: round {i + 1} of {rounds}: {last}")
    return timings


def time_training(ours: Ours, rounds: int) -> Timings:
    """Times our training step and PyTorch's, after checking that they agree."""
    ours.start()
    trainer = make_trainer(ours, make_torch_reference(ours))
    check_training(ours, trainer)
    x1, labels = torch_batch(ours)
    calls = {"dsr_jax": ours.train, "torch": lambda: trainer.step(x1, labels)}
    return time_alternately(calls, rounds, "train")


def time_registers(ours: Ours, without: Ours, rounds: int) -> Timings:
    """Times our training step with registers and without."""
    ours.start()
    without.start()
    return time_alternately({"registers": ours.train, "none": without.train}, rounds, "registers")


def time_sampling(ours: Ours, rounds: int) -> Timings:
    """Times our sampler and PyTorch's loop, after checking that their samples agree."""
    ours.start()
    sample, sample_torch = make_samplers(ours, make_torch_reference(ours))
    check_samples(sample(), sample_torch())
    return time_alternately({"dsr_jax": sample, "torch": sample_torch}, rounds, "sample")


def time_encoder(sides: EncoderSides, rounds: int) -> Timings:
    """Times our encoder and PyTorch's, after checking that they agree."""
    sides.check()
    return time_alternately({"dsr_jax": sides.plain, "torch": sides.torch()}, rounds, "encoder")


def time_input(sides: InputSides, kind: str, rounds: int, task: str) -> Timings:
    """Times our input pipeline and PyTorch's, after checking that both read the same pixels."""
    sides.check()
    return time_alternately({"dsr_jax": sides.ours(kind), "torch": sides.torch()}, rounds, task)


def time_evaluation(task: str, tiny: bool, rounds: int) -> Timings:
    """Times one of EVALUATION_TASKS."""
    if task == "fid":
        score = make_frechet(500, 32) if tiny else make_frechet(50_000)
        return {"dsr_jax": [measure(score) for _ in range(rounds)]}
    if task == "pr":
        precision_recall = make_precision_recall(500, 32) if tiny else make_precision_recall(10_000)
        return time_alternately({"dsr_jax": precision_recall}, rounds, task)
    sides = InceptionSides(2 if tiny else INCEPTION_BATCH)
    sides.check()
    theirs = sides.torch(channels_last=task == "inception-last")
    return time_alternately({"dsr_jax": sides.ours, "torch": theirs}, rounds, task)


def run_task(task: str, args: argparse.Namespace) -> Timings:
    """Times one of TASKS."""
    if task in EVALUATION_TASKS:
        return time_evaluation(task, args.size == "tiny", args.rounds)
    if task == "compile":
        size = "tiny" if args.size == "tiny" else "XL"
        log(f"compile: {size}")
        ours = Ours(make_config(size, 1, True, args.remat))
        return {"dsr_jax": [measure(ours.compile)]}
    if task in ("input", "files"):
        sides = InputSides(*(8, 32) if args.size == "tiny" else ())
        kind = "arrayrecord" if task == "input" else "folder"
        return time_input(sides, kind, args.rounds, task)
    if task in ("encoder", "ttr"):
        encoders = EncoderSides(args.size == "tiny", args.batch)
        if task == "encoder":
            return time_encoder(encoders, args.rounds)
        calls = {"registers": encoders.with_registers, "none": encoders.plain}
        return time_alternately(calls, args.rounds, task)
    ours = Ours(make_config(args.size, args.batch, True, args.remat))
    if task == "train":
        return time_training(ours, args.rounds)
    if task == "sample":
        return time_sampling(ours, args.rounds)
    without = Ours(make_config(args.size, args.batch, False, args.remat))
    return time_registers(ours, without, args.rounds)


def summarize(timings: Timings) -> dict[str, Any]:
    """Returns wall and CPU seconds: median and minimum by side, and the median ratio of pairs."""
    sides = {
        name: {
            "wall_median": statistics.median(t.wall for t in each),
            "wall_min": min(t.wall for t in each),
            "cpu_median": statistics.median(t.cpu for t in each),
        }
        for name, each in timings.items()
    }
    rounds = {name: [t._asdict() for t in each] for name, each in timings.items()}
    summary: dict[str, Any] = {"sides": sides, "rounds": rounds}
    if len(timings) == 2:
        pairs = list(zip(*timings.values(), strict=True))
        summary["wall_ratio"] = statistics.median(a.wall / b.wall for a, b in pairs)
        summary["cpu_ratio"] = statistics.median(a.cpu / b.cpu for a, b in pairs)
    return summary


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the results as a text table with one line per task and side."""
    head = "task            side       wall median    wall min  cpu median  wall ratio  cpu ratio"
    lines = [head]
    for task, summary in results.items():
        ratios = ""
        if "wall_ratio" in summary:
            ratios = f"{summary['wall_ratio']:12.2f}{summary['cpu_ratio']:11.2f}"
        for side, figures in summary["sides"].items():
            seconds = "".join(f"{figures[f'{k}']:12.3g}" for k in ("wall_median", "wall_min"))
            line = f"{task:15} {side:9} {seconds}{figures['cpu_median']:12.3g}{ratios}"
            lines.append(line)
            ratios = ""
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """Returns the processor, the number of cores this process may use, and versions."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].partition(":")[2].strip() if lines else cpu
    stamp = provenance()
    if "torch" in sys.modules:
        stamp["packages"]["torch"] = sys.modules["torch"].__version__
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), **stamp}


def log(text: str) -> None:
    """Prints progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "gpu":
        benchmark_gpu.main(argv[1:])
        return
    args = _parser().parse_args(argv)
    if args.threads:
        # Set before either library starts its threads, since both read their number from here.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    jax.config.update("jax_platforms", "cpu")
    # The entry points do this, too; both sides benefit.
    keep_freed_memory()
    tasks = args.tasks or TASKS
    if NEED_TORCH & set(tasks):
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
    results = {task: summarize(run_task(task, args)) for task in tasks}
    if "pr" in tasks:
        peak = peak_of_precision_recall(*(500, 32) if args.size == "tiny" else (10_000,))
        results["pr"]["peak_bytes"] = peak
    stamp = environment()
    versions = ", ".join(f"{n} {stamp['packages'].get(n)}" for n in ("jax", "jaxlib", "torch"))
    print(f"{stamp['cpu']}, {stamp['cores']} cores; {versions}; size {args.size}")
    print(table(results))
    for task, summary in results.items():
        if "peak_bytes" in summary:
            print(f"{task}: {summary['peak_bytes'] / 2**30:.2f} GiB at most beyond its inputs")
    if args.json:
        write_json(
            args.json,
            {"environment": stamp, "size": args.size, "batch": args.batch, "tasks": results},
        )


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument(
        "tasks",
        nargs="*",
        metavar="TASK",
        choices=[[], *TASKS],
        help=f"{', '.join(TASKS)}; default: all",
    )
    parser.add_argument("--size", choices=SIZES, default="S", help="size of the DiT")
    parser.add_argument("--batch", type=int, default=8, help="images of a step")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of timed calls")
    parser.add_argument(
        "--remat",
        choices=("none", "dots", "full"),
        default="",
        help="what the backward pass computes again; default: the config's",
    )
    parser.add_argument("--threads", type=int, default=0, help="cores to use; default: all")
    parser.add_argument("--json", type=Path, help="file for all figures")
    return parser


if __name__ == "__main__":
    run_main(main)
