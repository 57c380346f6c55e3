"""Injects faults into the processes and files of one job until it is done."""

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tools.faults.jobs import ROOT, Job
from tools.faults.permissions import allow_writing, deny_writing, why_not_deniable

LIVE = ("stop", "kill", "term", "disk", "readonly")
"""Faults of running processes; all but the first end them."""
DAMAGE = ("truncate", "flip", "remove")
END_SECONDS = 900.0
"""Time in which all processes of a command must end, on a machine that others may load."""
FAILURES = 3
"""Starts without a fault that may fail in a row."""


@dataclass
class Round:
    """Outcome of one job that was disturbed until it was done.

    Attributes:
      faults: Number of injected faults by kind.
      starts: Starts of the command.
      problem: What was lost; "" if nothing was.
    """

    faults: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    problem: str = ""


class Command:
    """Processes of one start of a command.

    Args:
      job: The job.
      inputs: Folder of its inputs.
      folder: Folder of its result.
      count: Number of processes, with two devices between them.
      cache: Folder of compiled programs.
    """

    def __init__(self, job: Job, inputs: Path, folder: Path, count: int, cache: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(2 // count),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        if count > 1:
            environment |= {"DSR_COORDINATOR": address, "DSR_NUM_PROCESSES": str(count)}
        self.tails = [deque[str](maxlen=60) for _ in range(count)]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", job.module, *job.words(inputs, folder)],
                cwd=ROOT,
                env=environment | ({"DSR_PROCESS_ID": str(rank)} if count > 1 else {}),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]
        for process, tail in zip(self.processes, self.tails, strict=True):
            threading.Thread(target=_drain, args=(process.stderr, tail), daemon=True).start()

    @property
    def running(self) -> bool:
        """Whether all processes run."""
        return all(process.poll() is None for process in self.processes)

    def wait(self, seconds: float) -> bool:
        """Returns whether all processes ended in time; kills those that did not."""
        limit = time.monotonic() + seconds
        try:
            for process in self.processes:
                process.wait(max(0.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
        return True

    @property
    def succeeded(self) -> bool:
        """Whether all processes ended with status 0."""
        return all(process.returncode == 0 for process in self.processes)

    @property
    def last_lines(self) -> str:
        """The last lines that each process wrote."""
        return "\n".join(line for tail in self.tails for line in [*tail][-12:])

    @property
    def raised(self) -> bool:
        """Whether a process ended with a traceback instead of an error with a remedy."""
        ended = [t for p, t in zip(self.processes, self.tails, strict=True) if p.returncode == 1]
        return any(any("Traceback (most recent" in line for line in tail) for tail in ended)


def _drain(stream: Any, tail: deque[str]) -> None:
    for line in stream:
        tail.append(line.rstrip())


def play_round(
    job: Job,
    inputs: Path,
    folder: Path,
    cache: Path,
    reference: Any,
    rng: np.random.Generator,
    *,
    processes: int,
    budget: int,
) -> Round:
    """Disturbs a job with up to `budget` faults, restarts it until it is done, and compares.

    Args:
      job: The job.
      inputs: Folder of its inputs.
      folder: A new folder for its result.
      cache: Folder of compiled programs.
      reference: Result of an undisturbed run.
      rng: Decides which faults come when.
      processes: Number of processes of the command.
      budget: Largest number of faults.
    """
    found, failures = Round(), 0
    folder.mkdir(parents=True)
    endings = [kind for kind in LIVE[1:] if kind != "readonly" or not why_not_deniable(folder)]
    while True:
        command = Command(job, inputs, folder, processes, cache)
        found.starts += 1
        try:
            left = budget - found.faults.total()
            injected = _disturb(command, job, folder, rng, left, endings)
            ended = command.wait(END_SECONDS)
        finally:
            command.wait(0)
            allow_writing(folder)
        found.faults.update(injected)
        if not ended:
            found.problem = f"after {injected} a process does not end:\n{command.last_lines}"
            return found
        if command.raised:
            found.problem = f"after {injected} a traceback:\n{command.last_lines}"
            return found
        failures = 0 if injected or command.succeeded else failures + 1
        if failures == FAILURES:
            found.problem = f"the command fails {FAILURES} times:\n{command.last_lines}"
            return found
        if budget > found.faults.total() and rng.random() < 0.9:
            kind = _damage(job, folder, rng)
            if kind:
                found.faults[kind] += 1
                continue
        if command.succeeded:
            break
    result = job.result(folder)
    if result != reference:
        found.problem = f"another result: {_difference(result, reference)}"
    return found


def _disturb(
    command: Command,
    job: Job,
    folder: Path,
    rng: np.random.Generator,
    budget: int,
    endings: Sequence[str],
) -> list[str]:
    """Injects faults into one start of a command, the last of `endings`; returns their kinds."""
    injected: list[str] = []
    kinds = ["stop"] * int(rng.integers(0, 3)) + [endings[int(rng.integers(len(endings)))]]
    for kind in kinds[:budget] if budget > 0 else []:
        _wait_for_progress(command, job, folder, int(rng.integers(0, 4)))
        time.sleep(float(rng.random()) * 0.3)
        if not command.running:
            break
        victim = command.processes[int(rng.integers(len(command.processes)))]
        if kind == "stop":
            victim.send_signal(signal.SIGSTOP)
            time.sleep(float(rng.random()))
            victim.send_signal(signal.SIGCONT)
        elif kind == "disk":
            limit = int(rng.choice([0, 1000, 20_000]))
            for process in command.processes:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        elif kind == "readonly":
            deny_writing(folder)
        else:
            # A preempted slice takes all of its processes; a broken host only one.
            everyone = rng.random() < 0.7
            for process in command.processes if everyone else [victim]:
                process.send_signal(signal.SIGKILL if kind == "kill" else signal.SIGTERM)
        injected.append(kind)
    return injected


def _wait_for_progress(command: Command, job: Job, folder: Path, count: int) -> None:
    """Waits until a start has made some outputs, or has ended."""
    before = {path.name for path in job.outputs(folder)}
    while command.running:
        if len({path.name for path in job.outputs(folder)} - before) >= count:
            return
        time.sleep(0.02)


def _damage(job: Job, folder: Path, rng: np.random.Generator) -> str:
    """Damages a file of the newest output; returns the kind of fault, "" if there is none."""
    files = [path for path in job.damageable(folder) if path.stat().st_size]
    if not files:
        return ""
    path = files[int(rng.integers(len(files)))]
    kind = DAMAGE[int(rng.integers(len(DAMAGE)))]
    if kind == "remove":
        path.unlink()
        return kind
    content = bytearray(path.read_bytes())
    if kind == "truncate":
        del content[int(rng.integers(len(content))) :]
    else:
        content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    return kind


def _difference(result: Any, reference: Any) -> str:
    if not isinstance(result, dict) or not isinstance(reference, dict):
        return f"{str(result)[:300]} in place of {str(reference)[:300]}"
    for key in sorted({*result, *reference}):
        if result.get(key) != reference.get(key):
            return f"{key}: {_difference(result.get(key), reference.get(key))}"
    return ""
