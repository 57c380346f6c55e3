"""Trains for thousands of steps and shows that memory, files and threads stay flat.

    python tools/soak.py --steps=2000 --out=/tmp/soak

Starts `python -m dsr_jax.train` on a tiny denoiser, with checkpoints and log records, and reads
resident memory, open files and threads of the process from /proc while it runs. The last quarter of
the steps is compared with the second one: the exit status is 1 if memory grew by more than 3% or
16 MB, whichever is more, or if there are more open files or threads. OUT then has soak.json and
soak.png.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dsr_jax.core.cli import make_parser, positive_int, run_main
from dsr_jax.core.errors import ProcessError
from dsr_jax.core.files import write_json
from dsr_jax.telemetry.writers import read_metrics

ROOT = Path(__file__).parents[1]
TINY = (
    f"--config={ROOT / 'configs' / 'digits.py'}:runlocal",
    "--config.model.hidden_size=16",
    "--config.model.depth=2",
    "--config.model.num_heads=2",
    "--config.registers.num=1",
    "--config.sample.every_steps=0",
    "--config.eval.classifier=",
    "--config.eval.num_samples=0",
    "--config.log.every_steps=5",
)
GROWTH, GROWTH_BYTES, MORE = 0.03, 16 * 2**20, 2
POLL_SECONDS = 0.25


class Reading(NamedTuple):
    """What a process uses.

    Attributes:
      step: Step of its last log record.
      memory: Resident bytes.
      files: Open file handles.
      threads: Threads.
    """

    step: int
    memory: int
    files: int
    threads: int


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`; returns 1 if something grows."""
    args, overrides = _parser().parse_known_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    readings = watch(args.out / "run", args.steps, args.checkpoint_every, overrides)
    problems = find_growth(readings)
    write_json(
        args.out / "soak.json", {"readings": [r._asdict() for r in readings], "growth": problems}
    )
    plot(readings, args.out / "soak.png")
    for problem in problems:
        print(problem)
    print(f"steps: {readings[-1].step}, readings: {len(readings)}, growing: {len(problems)}")
    return int(bool(problems))


def watch(
    workdir: Path, steps: int, checkpoint_every: int, overrides: Sequence[str] = ()
) -> list[Reading]:
    """Trains in a process of its own and returns what it used over time.

    Raises:
      ProcessError: If the training fails.
    """
    command = [sys.executable, "-m", "dsr_jax.train", *TINY, f"--workdir={workdir}"]
    command += [f"--config.train.steps={steps}", *overrides]
    command += [f"--config.checkpoint.every_steps={checkpoint_every}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    readings: list[Reading] = []
    with (workdir.parent / "train.log").open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        try:
            while process.poll() is None:
                records = read_metrics(workdir)
                reading = _read(process.pid, records[-1]["step"] if records else 0)
                if reading is not None and reading.step:
                    readings.append(reading)
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
    if process.returncode or not readings:
        raise ProcessError(f"the training failed, see {workdir.parent / 'train.log'}")
    return readings


def _read(pid: int, step: int) -> Reading | None:
    """Returns what a process uses now; None once it has ended."""
    try:
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        memory = int(status["VmRSS"].split()[0]) * 1024
        files = len(os.listdir(f"/proc/{pid}/fd"))
        return Reading(step, memory, files, int(status["Threads"]))
    except (OSError, KeyError):
        return None


def find_growth(readings: Sequence[Reading]) -> list[str]:
    """Compares the last quarter of the steps with the second; returns what has grown."""
    last = readings[-1].step
    early = [r for r in readings if last / 4 <= r.step < last / 2]
    late = [r for r in readings if r.step >= 3 * last / 4]
    if not early or not late:
        return ["there are too few readings to compare; train for more steps"]
    problems = []
    before, after = (statistics.median(r.memory for r in part) for part in (early, late))
    if after - before > max(GROWTH * before, GROWTH_BYTES):
        problems.append(f"memory grows from {before / 2**20:.0f} to {after / 2**20:.0f} MiB")
    for name in ("files", "threads"):
        before, after = (statistics.median(getattr(r, name) for r in p) for p in (early, late))
        if after - before > MORE:
            problems.append(f"{name} grow from {before:g} to {after:g}")
    return problems


def plot(readings: Sequence[Reading], path: Path) -> None:
    """Draws memory, files and threads over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(7, 4.5))
    steps = [r.step for r in readings]
    upper.plot(steps, [r.memory / 2**20 for r in readings])
    upper.set_ylabel("resident memory, MiB")
    upper.set_ylim(0, 1.2 * max(r.memory for r in readings) / 2**20)
    lower.plot(steps, [r.files for r in readings], label="open files")
    lower.plot(steps, [r.threads for r in readings], label="threads")
    lower.set_ylim(bottom=0)
    lower.set_xlabel("training step")
    lower.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=positive_int, default=2000, help="length of the training")
    parser.add_argument(
        "--checkpoint-every", type=positive_int, default=50, help="steps between two checkpoints"
    )
    parser.add_argument("--out", type=Path, required=True, help="new folder of run and report")
    return parser


if __name__ == "__main__":
    run_main(main)
