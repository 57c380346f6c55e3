"""The GPU benchmark without a GPU: a dry run, its checks, its budget of time, and its errors."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dsr_jax.core.errors import ConfigError, NumericsError
from tests.requirements import require
from tools import benchmark, benchmark_gpu, benchmark_gpu_checks

DRY = ["--platform=cpu", "--size=tiny", "--batch=4", "--images=2", "--calls=1", "--rounds=1"]


@pytest.mark.slow
def test_rows_run_dry(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """All but the GPU: both sides' processes, checks and table."""
    require("torch", "torch")
    path, rows = tmp_path / "figures.json", ["train-bf16", "ttr"]
    benchmark.main(["gpu", *rows, *DRY, f"--json={path}"])
    printed = capfd.readouterr().out
    shown = [line.split()[:2] for line in printed.splitlines()[1:]]
    assert shown == [[row, side] for row in rows for side in benchmark_gpu.SIDES]
    figures = json.loads(path.read_text())
    assert figures["not_measured"] == figures["unchecked"] == {}
    for row, figure in figures["rows"].items():
        assert 0 < figure["error"] <= benchmark_gpu.TOLERANCE[benchmark_gpu.ROWS[row]]
        assert figure["torch"]["flops"] == figure["dsr_jax"]["flops"] > 0
        assert len(figure["dsr_jax"]["rounds"]) == figure["dsr_jax"]["calls"] == 1
    # A CPU has no limit to choose by.
    ours = figures["rows"]["train-bf16"]["dsr_jax"]
    assert ours["choice"] == {"policy": "none", "free_bytes": None, "compiled": []}
    assert ours["remat"] == "none"


def sides(ours: Any, theirs: Any) -> list[dict[str, Any]]:
    """Figures of two sides with these results."""
    common = {"seconds": 1.0, "flops": 10**15, "device": "NVIDIA H200", "images": 2}
    common |= {"peak_bytes": 2**31, "prepared_seconds": 3.0}
    return [common | {"results": np.asarray(x)} for x in (ours, theirs)]


def test_rows_of_unlike_sides_are_refused() -> None:
    with pytest.raises(NumericsError, match=r"differ by 2\.6e-02"):
        benchmark_gpu.compare("train-bf16", *sides([2.0, 1.9], [2.0, 1.95]))
    with pytest.raises(NumericsError, match="differ by inf"):
        benchmark_gpu.compare("ttr", *sides([1.0, 1.0], [1.0, np.nan]))
    row = benchmark_gpu.compare("train", *sides([2.0, 1.9], [2.0, 1.901]))
    assert row["torch"]["mfu"] == pytest.approx(1 / 0.989, rel=1e-3)
    line = benchmark_gpu.table({"train": row}).splitlines()[1]
    assert line.split() == ["train", "dsr_jax", "1.0000", "2.0", "101.1%", "2.0", "3.0", "1.00"]


class Machine:
    """Sides of rows that take some seconds each, in place of processes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
        self.seconds, self.now, self.started = seconds, 1000.0, []
        monkeypatch.setattr(benchmark_gpu, "_run_group", self.run)
        monkeypatch.setattr(benchmark_gpu.time, "time", lambda: self.now)

    def run(self, command: list[str], environment: dict[str, str], seconds: float) -> int | None:
        """Stands for `_run_group`; what exceeds its time has measured nothing."""
        args = benchmark_gpu.make_parser_gpu().parse_args(command[3:])
        path = args.folder / f"{args.rows[0]}-{args.side}"
        self.started.append(path.name)
        needed = self.seconds[args.side]
        self.now += min(needed, seconds)
        if needed > seconds:
            return None
        figures = sides([1.0], [1.0])[0]
        np.save(path.with_suffix(".npy"), figures.pop("results"))
        path.with_suffix(".json").write_text(json.dumps(figures))
        return 0


def test_a_budget_that_ends_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine, path = Machine(monkeypatch, dsr_jax=20.0, torch=20.0), tmp_path / "figures.json"
    command = ["gpu", *DRY, "train", "train-bf16", "sample", "ttr", f"--json={path}"]
    with pytest.raises(NumericsError, match="no figures for sample, ttr"):
        benchmark.main([*command, "--minutes=1.5"])
    assert machine.started == [
        *("train-dsr_jax", "train-torch", "train-bf16-dsr_jax", "sample-dsr_jax", "sample-torch"),
    ]
    assert machine.now == 1090
    figures = json.loads(path.read_text())
    assert list(figures["rows"]) == ["train", "train-bf16"]
    # A side that was not compared is kept, but not printed.
    assert list(figures["unchecked"]) == ["sample dsr_jax"]
    printed = capsys.readouterr().out
    assert "sample: not measured: torch was not done in time; give more --minutes" in printed
    assert "ttr: not measured: no time was left; give more --minutes than 1.5" in printed
    assert [line.split()[0] for line in printed.splitlines()[1:5]] == [
        *("train", "train", "train-bf16", "train-bf16"),
    ]


def test_an_interrupt_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine, path = Machine(monkeypatch, dsr_jax=1.0, torch=1.0), tmp_path / "figures.json"
    run = machine.run

    def interrupted(command: list[str], *others: Any) -> int | None:
        if len(machine.started) == 3:
            raise KeyboardInterrupt
        return run(command, *others)

    monkeypatch.setattr(benchmark_gpu, "_run_group", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(["gpu", *DRY, f"--json={path}"])
    figures = json.loads(path.read_text())
    assert (list(figures["rows"]), list(figures["unchecked"])) == (["train"], ["sample dsr_jax"])
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_rounds_end_with_their_time_and_are_there_one_by_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now, path, seen = [0.0], tmp_path / "figures.json", []

    def call() -> None:
        now[0] += 0.5
        seen.append(len(json.loads(path.read_text())["rounds"]) if path.exists() else 0)

    monkeypatch.setattr(benchmark_gpu.time, "time", lambda: now[0])
    monkeypatch.setattr(benchmark_gpu.time, "perf_counter", lambda: now[0])
    side = SimpleNamespace(call=call, wait=lambda result: None, figures=dict)
    args = benchmark_gpu.make_parser_gpu().parse_args(["--rounds=9", "--until=5"])
    benchmark_gpu.measure(side, args, path, 7.0)
    # One call to see how many make a round of two seconds, then rounds until time is over.
    assert seen == [0, *[0] * 4, *[1] * 4, *[2] * 4]
    figures = json.loads(path.read_text())
    assert figures["rounds"] == [0.5] * 3
    assert (figures["seconds"], figures["calls"], figures["prepared_seconds"]) == (0.5, 4, 7.0)


def test_processes_end_with_their_time() -> None:
    start = time.monotonic()
    words = ["-c", "import subprocess, sys; subprocess.run(['sleep', '60'])"]
    assert benchmark_gpu._run_group([sys.executable, *words], {}, 0.3) is None
    assert time.monotonic() - start < 30
    assert benchmark_gpu._run_group([sys.executable, "-c", "raise SystemExit(3)"], {}, 60) == 3


TORCH = "class version: cuda = {version!r}\nclass cuda: is_available = lambda: {sees}\n"
JAX = """
class jax:
    pass
def devices():
    return [type("Device", (), {{"platform": "gpu"}})]
def block_until_ready(x):
    return x
class nn:
    @staticmethod
    def dot_product_attention(*args, implementation):
        raise RuntimeError("{error}")
"""
NUMPY = "import numpy\nbfloat16 = 'float32'\nones = numpy.ones\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"torch.py": "raise ImportError('libcudart')"}, "PyTorch cannot be imported: libcudart"),
        (
            {"torch.py": "__version__ = '2.9+cpu'\n" + TORCH.format(version=None, sees=False)},
            r"built without CUDA: 2.9\+cpu",
        ),
        (
            {"torch.py": "__version__ = '2.9'\n" + TORCH.format(version="13.0", sees=False)},
            "PyTorch sees no GPU: 2.9 for CUDA 13.0[^\n]*\n[\\s\\S]*older CUDA",
        ),
        (
            {
                "torch.py": "__version__ = '2.9'\n" + TORCH.format(version="13.0", sees=True),
                "triton.py": "raise ImportError('no module')",
            },
            "torch.compile needs triton: no module",
        ),
        ({"torch.py": "import nothing_there"}, "PyTorch cannot be imported: No module"),
        ({"torch.py": "raise SystemError(7)"}, "torch failed on this machine with exit status 1"),
        (
            {
                "torch.py": TORCH.format(version="13.0", sees=True),
                "triton.py": "",
                "jax/__init__.py": JAX.format(error="cuDNN 9.1.0 is older than 9.8.0"),
                "jax/numpy.py": NUMPY,
            },
            "cuDNN's attention does not run in jax: cuDNN 9.1.0[\\s\\S]*LD_LIBRARY_PATH",
        ),
    ],
)
def test_what_a_machine_lacks_is_named(
    files: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In packages that stand for incomplete ones."""
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        benchmark_gpu_checks.check_machine(encoders=False)


@pytest.mark.slow
def test_a_machine_without_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setattr(benchmark_gpu_checks, "_TORCH", "")
    with pytest.raises(ConfigError, match=r"jax sees no GPU[\s\S]*--platform=cpu --size=tiny"):
        benchmark.main(["gpu", "train"])


def test_arguments_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"would take hours[\s\S]*--size=tiny"):
        benchmark.main(["gpu", "--platform=cpu"])
    with pytest.raises(ConfigError, match="'trian' is no row"):
        benchmark.main(["gpu", "trian"])
    with pytest.raises(ConfigError, match=r"did you mean config\.model\.kernels"):
        benchmark.main(["gpu", "train", "--config.model.kernel=triton"])
