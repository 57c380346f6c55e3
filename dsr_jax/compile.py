"""Compiles a config's training step for an absent TPU slice or absent GPUs; reports memory, time.

    python -m dsr_jax.compile --config=configs/rae_dit.py --topology=v5e:8x8 --out=plans/rae_dit

Prints memory per chip by purpose, FLOPs, memory traffic, collectives, and the least time of a step
and of the run; --out also gets report.json and report.html. If the step does not fit, the exit
status is 1 and the report advises. Any key of the config can be set, as in --config.mesh.fsdp=16.

No TPU is needed, only its compiler: pip install 'dsr_jax[tpu]'. --topology=2xv5e:8x8 stands for two
slices that communicate over the data-center network. Nor is a GPU: --topology=h100:8 is a node of
eight, 2xh100:8 two of them (a100, h100, h200); pip install 'dsr_jax[cuda]'. The memory of a GPU is
what JAX takes of it, three quarters, or XLA_PYTHON_CLIENT_MEM_FRACTION.

    python -m dsr_jax.compile --config=configs/rae_dit.py --topology=v5e:8x8 --sweep

compiles meshes, remat policies and micro-batches one after the other, minutes each, and ranks those
that fit; the --try options restrict it. --out gets the report of the best, and sweep.json with all.
"""

import argparse
import functools
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.core.cli import make_parser, positive_int, run_main
from dsr_jax.core.files import write_atomic, write_json
from dsr_jax.core.secrets import hide_secrets
from dsr_jax.parallel.topologies import find_topology
from dsr_jax.planning.page import make_plan_page
from dsr_jax.planning.programs import compile_report
from dsr_jax.planning.report import Report, format_report
from dsr_jax.planning.sweep import line, sweep, trials


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's); returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    args, overrides = _parser().parse_known_args(words)
    config, topology = configs.load(args.config, overrides), find_topology(args.topology)
    # Frozen networks and this program's own arithmetic stay off a TPU or GPU that may be here.
    jax.config.update("jax_platforms", "cpu")
    build.set_precision(config)
    subject = {
        "config": args.config,
        "command": shlex.join(["python", "-m", "dsr_jax.compile", *map(hide_secrets, words)]),
    }
    if args.sweep:
        chosen = trials(
            config, topology, args.try_fsdp, args.try_remat, args.try_accumulate, args.try_tensor
        )
        reports = sweep(
            config, topology, subject, chosen, note=lambda text: print(text, flush=True)
        )
        if args.out:
            write_json(Path(args.out) / "sweep.json", reports)
        print("\nfrom the fastest to what does not fit:", *map(line, reports), sep="\n", end="\n\n")
        report = reports[0]
    else:
        program = "sampler" if args.sampler else "train"
        keep = functools.partial(write_atomic, args.hlo) if args.hlo else lambda text: None
        report = compile_report(config, topology, program, subject, keep)
    print(format_report(report))
    if args.out:
        _save(report, Path(args.out))
    return 0 if report["fits"] else 1


def _save(report: Report, folder: Path) -> None:
    write_json(folder / "report.json", report)
    write_atomic(folder / "report.html", make_plan_page(report))
    print(f"\n{folder / 'report.json'}, {folder / 'report.html'}")


def _words(kind: Callable[[str], Any], text: str) -> list[Any]:
    return [kind(word) for word in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, "python -m dsr_jax.compile")
    parser.add_argument(
        "--config",
        required=True,
        help="config file with its arguments, joined by commas: configs/x.py:key=value,key",
    )
    parser.add_argument(
        "--topology",
        required=True,
        help="TPU slices, as in v5e:4x4, 2xv5e:4x4, or nodes of GPUs, as in h100:8, 2xh100:8",
    )
    parser.add_argument("--out", type=Path, help="folder for report.json and report.html")
    parser.add_argument("--hlo", type=Path, help="file for the text of the compiled program")
    parser.add_argument("--sampler", action="store_true", help="the sampler, not the training step")
    parser.add_argument("--sweep", action="store_true", help="try layouts of the training step")
    for name, kind in (
        ("fsdp", positive_int),
        ("tensor", positive_int),
        ("remat", str),
        ("accumulate", positive_int),
    ):
        parser.add_argument(
            f"--try-{name}",
            type=functools.partial(_words, kind),
            default=(),
            help="values to try in a sweep, as in A,B",
        )
    return parser


if __name__ == "__main__":
    run_main(main)
