"""The evaluate command on two processes that communicate over loopback."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dsr_jax.core.files import read_json
from tests.tiny_inception import convert_tiny

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
SAMPLES, REAL = 75, 29
SECONDS = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples, real images, and a narrow network."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.RandomState(0)
    for name, count, top in (("samples", SAMPLES, 256), ("real", REAL, 200)):
        images = random.randint(0, top, (count, 16, 16, 3)).astype(np.uint8)
        np.savez(folder / f"{name}.npz", images)
    convert_tiny(folder)
    return folder


def launch(count: int, program: tuple[str, ...], *arguments: str) -> list[subprocess.Popen[str]]:
    """Starts a program on `count` processes of two devices in all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(2 // count),
        "PYTHONPATH": str(REPOSITORY),
    }
    shared.pop("XLA_FLAGS", None)
    if count > 1:
        shared |= {"DSR_COORDINATOR": f"127.0.0.1:{port}", "DSR_NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, *program, *arguments],
            cwd=REPOSITORY,
            env={**shared, "DSR_PROCESS_ID": str(rank)} if count > 1 else shared,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Waits for the processes; returns what each wrote."""
    try:
        outputs = ["".join(process.communicate(timeout=SECONDS)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def evaluate(folder: Path, count: int, out: Path) -> list[subprocess.Popen[str]]:
    """Starts the scoring of the samples."""
    files = [str(folder / "samples.npz"), "--reference", str(folder / "real.npz")]
    how = ["--inception", str(folder / "inception"), "--metrics", "fid,sfid,is,pr"]
    saved = ["--batch", "8", "--save-every", "16", "--out", str(out)]
    return launch(count, ("-m", "dsr_jax.evaluate"), *files, *how, *saved)


@pytest.fixture(scope="module")
def scores(folder: Path) -> dict[str, float]:
    """Those of one process without interruption."""
    out = folder / "whole.json"
    finish(evaluate(folder, 1, out))
    return read_json(out)["scores"]


def test_two_processes_score_as_one_does(folder: Path, scores: dict[str, float]) -> None:
    out = folder / "two.json"
    printed, quiet = finish(evaluate(folder, 2, out))
    found = read_json(out)
    assert found["scores"] == pytest.approx(scores, rel=1e-6)
    assert set(scores) == {"fid", "sfid", "inception_score", "precision", "recall"}
    assert found["provenance"]["num_processes"] == 2
    assert "inception_score" in printed and "score" not in quiet
    assert not list(folder.glob("two.json.parts*"))


def test_a_pass_of_two_killed_processes_continues(folder: Path, scores: dict[str, float]) -> None:
    out = folder / "killed.json"
    progress = folder / "killed.json.parts" / "samples" / "progress.npz"
    processes, began = evaluate(folder, 2, out), time.monotonic()
    while not progress.exists() and time.monotonic() - began < SECONDS:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert progress.exists() and not out.exists()
    (printed,) = finish(evaluate(folder, 1, out))
    assert f"of {SAMPLES} images" in printed.partition("continuing after ")[2]
    assert read_json(out)["scores"] == pytest.approx(scores, rel=1e-6)


def test_two_processes_make_the_reference_that_one_makes(folder: Path) -> None:
    found = []
    for count in (1, 2):
        out = folder / f"reference{count}.npz"
        how = ["--inception", str(folder / "inception"), "--batch", "8", "--out", str(out)]
        program = (str(REPOSITORY / "tools" / "make_reference.py"),)
        finish(launch(count, program, str(folder / "real.npz"), *how))
        with np.load(out) as arrays:
            found.append({name: arrays[name] for name in ("mu", "sigma", "mu_s", "features")})
    for name, want in found[0].items():
        scale = np.abs(want).max()
        np.testing.assert_allclose(found[1][name] / scale, want / scale, atol=1e-6, err_msg=name)
