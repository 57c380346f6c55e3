"""Kills, stops, starves and damages a command until it is done, and compares the result.

    python tools/torture.py --job=train --faults=100 --seed=0 --out=/tmp/torture

Real processes, one or two of them, are stopped and continued (stop), ended (kill, term), denied all
further disk space (disk, by a limit on file sizes, which any user may set), and find their folders
read-only (readonly, by permissions, or for root by the flag of `chattr +i`). Files of their newest
checkpoint, shard or partial output are cut (truncate), changed by a bit (flip) or deleted (remove).
The same command is started again until it is done. Then final arrays, metrics, samples, latents or
scores must equal those of a run that nobody disturbed, and no command may hang or end in a
traceback; otherwise the fault counts as lost. The last line is `faults: N, lost: M`, and the exit
status is 1 if M > 0. The same command continues where an earlier one stopped; what was lost is kept
under --out. The code must stay the same until the end, since a restart with other code may compute
other bits: use a worktree that nobody changes.
"""

import argparse
import hashlib
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsr_jax.core.cli import make_parser, positive_int, run_main
from dsr_jax.core.errors import ConfigError
from dsr_jax.core.files import read_json, write_json
from tools.faults.injection import DAMAGE, LIVE, Command, play_round
from tools.faults.jobs import JOBS, ROOT, Job
from tools.faults.permissions import allow_writing, why_not_deniable

KINDS = (*LIVE, *DAMAGE)
PER_ROUND = 12
"""Faults until a job is left to finish and is compared."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`; returns 1 if anything was lost."""
    args = _parser().parse_args(argv)
    job, out = JOBS[args.job], args.out / args.job
    counts = tuple(n for n in args.processes or job.processes if n in job.processes)
    code = _check_code(out)
    record_path = out / f"seed_{args.seed}.json"
    record = (
        read_json(record_path)
        if record_path.is_file()
        else {"job": args.job, "seed": args.seed, "faults": {}, "rounds": [], "lost": 0}
    )
    inputs, cache = _make_inputs(job, out), out / "programs"
    if problem := why_not_deniable(out):
        print(f"folders are not made read-only here: {problem}", file=sys.stderr)
    while sum(record["faults"].values()) < args.faults:
        number = len(record["rounds"])
        count = counts[number % len(counts)]
        reference = _reference(job, inputs, out, cache, count)
        folder = out / f"seed_{args.seed}_round_{number}"
        allow_writing(folder)
        shutil.rmtree(folder, ignore_errors=True)
        rng = np.random.default_rng([args.seed, number, sorted(JOBS).index(args.job)])
        left = args.faults - sum(record["faults"].values())
        began = time.monotonic()
        found = play_round(
            job,
            inputs,
            folder,
            cache,
            reference,
            rng,
            processes=count,
            budget=min(PER_ROUND, left),
        )
        if code_digest() != code:
            raise ConfigError(
                f"the code in {ROOT} has changed during round {number}, which is not counted",
                "use a worktree that nobody changes, and a new --out",
            )
        record["faults"] = dict(Counter(record["faults"]) + found.faults)
        record["lost"] += bool(found.problem)
        entry = {"processes": count, "faults": dict(found.faults), "starts": found.starts}
        seconds = round(time.monotonic() - began, 1)
        record["rounds"].append({**entry, "seconds": seconds, "problem": found.problem})
        write_json(record_path, record)
        print(f"round {number}: {entry}, {seconds} s {found.problem or 'equal'}", file=sys.stderr)
        if not found.problem:
            shutil.rmtree(folder)
    _print_table(record)
    return int(record["lost"] > 0)


def code_digest() -> str:
    """Returns a digest of all that decides what the commands compute, but for their packages."""
    digest = hashlib.sha256()
    for folder in ("configs", "dsr_jax", "tests", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return "sha256:" + digest.hexdigest()


def _check_code(out: Path) -> str:
    """Returns the code's digest, which `out` records on its first use.

    Raises:
      ConfigError: If the results in `out` are of other code.
    """
    path, code = out / "code.json", code_digest()
    if not path.exists() and not (out / "inputs.done").exists():
        write_json(path, {"digest": code})
    elif not path.exists() or read_json(path)["digest"] != code:
        raise ConfigError(
            f"the results in {out} are of other code, which may compute other bits",
            "name another --out, or go back to that code",
        )
    return code


def _make_inputs(job: Job, out: Path) -> Path:
    """Makes the job's inputs once, and returns their folder."""
    inputs = out / "inputs"
    if not (out / "inputs.done").exists():
        shutil.rmtree(inputs, ignore_errors=True)
        inputs.mkdir(parents=True)
        jax.config.update("jax_disable_most_optimizations", True)
        job.setup(inputs)
        (out / "inputs.done").touch()
    return inputs


def _reference(job: Job, inputs: Path, out: Path, cache: Path, count: int) -> Any:
    """Returns the result of an undisturbed run on `count` processes.

    Raises:
      RuntimeError: If the command fails without any fault.
    """
    path = out / f"reference_{count}.json"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=out) as folder:
            command = Command(job, inputs, Path(folder), count, cache)
            if not command.wait(600) or not command.succeeded:
                raise RuntimeError(f"{job.module} fails undisturbed:\n{command.last_lines}")
            write_json(path, job.result(Path(folder)))
    return read_json(path)


def _print_table(record: dict[str, Any]) -> None:
    faults, rounds = record["faults"], record["rounds"]
    starts = sum(entry["starts"] for entry in rounds)
    print(f"| job | {' | '.join(KINDS)} | starts | results compared | lost |")
    print(f"|{'---|' * (len(KINDS) + 4)}")
    counts = " | ".join(str(faults.get(kind, 0)) for kind in KINDS)
    print(f"| {record['job']} | {counts} | {starts} | {len(rounds)} | {record['lost']} |")
    print(f"faults: {sum(faults.values())}, lost: {record['lost']}")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--job", required=True, choices=sorted(JOBS), help="command to disturb")
    add("--faults", type=positive_int, default=100, help="number of faults")
    add("--seed", type=int, default=0, help="decides which faults come when")
    add(
        "--processes",
        type=lambda text: [int(number) for number in text.split(",")],
        help="numbers of processes, in turn; default: 1,2 where the command runs on several",
    )
    add("--out", type=Path, required=True, help="folder for inputs, results and the record")
    return parser


if __name__ == "__main__":
    run_main(main)
