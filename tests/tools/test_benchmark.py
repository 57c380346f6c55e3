"""The benchmark against PyTorch: what it prints, and that it refuses to compare unlike things."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from dsr_jax import build
from dsr_jax.core.errors import NumericsError
from tests.requirements import require
from tools import benchmark, benchmark_evaluation, benchmark_sides

torch = require("torch", "torch")


def _tiny() -> benchmark_sides.Ours:
    ours = benchmark_sides.Ours(benchmark_sides.make_config("tiny", 4, True, ""))
    ours.start()
    return ours


def test_figures_of_two_sides_are_paired() -> None:
    timings = {
        "ours": [benchmark.Timing(1.0, 2.0), benchmark.Timing(6.0, 6.0), benchmark.Timing(3.0, 3)],
        "torch": [benchmark.Timing(2.0, 2.0), benchmark.Timing(4.0, 2.0), benchmark.Timing(3.0, 1)],
    }
    summary = benchmark.summarize(timings)
    assert summary["wall_ratio"] == 1.0  # of 0.5, 1.5, 1
    assert summary["cpu_ratio"] == 3.0
    assert summary["sides"]["ours"] == {"wall_median": 3.0, "wall_min": 1.0, "cpu_median": 3.0}


def test_cpu_time_of_idle_call_is_below_wall() -> None:
    timing = benchmark.measure(lambda: benchmark.time.sleep(0.05))
    assert timing.wall >= 0.05
    assert timing.cpu < timing.wall


@pytest.mark.slow
@pytest.mark.parametrize("registers", [True, False])
def test_reference_gives_the_same_output(registers: bool) -> None:
    config = benchmark_sides.make_config("tiny", 2, registers, "")
    ours = benchmark_sides.Ours(config)
    ours.start()
    reference = benchmark_sides.make_torch_reference(ours)
    x, t, labels = ours.batch["image"], np.array([0.2, 0.9], np.float32), np.array([3, 10])
    got = jax.jit(build.make_denoise_fn(ours.model))(ours.state.params, x, t, labels)
    with torch.no_grad():
        want = reference(
            benchmark_sides.channels_first(x), torch.from_numpy(t), torch.from_numpy(labels)
        )
    benchmark_sides.require_close("output", "outputs", benchmark_sides.channels_first(got), want)


@pytest.mark.slow
def test_perturbed_weight_is_refused() -> None:
    ours = _tiny()
    reference = benchmark_sides.make_torch_reference(ours)
    with torch.no_grad():
        reference.blocks[1].mlp.w3.weight[0, 0] += 0.1
    with pytest.raises(NumericsError, match="outputs differ"):
        benchmark_sides.check_training(ours, benchmark_sides.make_trainer(ours, reference))


@pytest.mark.slow
def test_optimizer_with_another_rate_is_rejected() -> None:
    ours = _tiny()
    trainer = benchmark_sides.make_trainer(ours, benchmark_sides.make_torch_reference(ours))
    trainer.optimizer.param_groups[0]["lr"] *= 10
    with pytest.raises(NumericsError, match="parameters after a step"):
        benchmark_sides.check_training(ours, trainer)


def test_differing_samples_are_refused() -> None:
    images = np.random.default_rng(0).integers(1, 255, (2, 16, 16, 8)).astype(np.uint8)
    neighbor = images.copy()
    neighbor[0, 0, 0, 0] -= 1
    benchmark_sides.check_samples(images, neighbor)
    for other in (images - 1, np.roll(images, 1)):
        with pytest.raises(NumericsError, match="samples differ"):
            benchmark_sides.check_samples(images, other)


@pytest.mark.slow
def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    tasks = ("train", "sample", "encoder", "input", "files", "ttr")
    command = [*tasks, "--size", "tiny", "--rounds", "1", "--json", str(path)]
    platforms = jax.config.jax_platforms
    try:
        benchmark.main(command)
    finally:
        jax.config.update("jax_platforms", platforms)
    environment, _, *rows = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in environment
    assert [row.split()[:2] for row in rows] == [
        *([task, side] for task in tasks[:-1] for side in ("dsr_jax", "torch")),
        *(["ttr", side] for side in ("registers", "none")),
    ]
    figures = json.loads(path.read_text())
    assert set(figures["tasks"]) == set(tasks)
    assert len(figures["tasks"]["train"]["rounds"]["torch"]) == 1


@pytest.mark.slow
def test_inception_and_ready_features(capsys: pytest.CaptureFixture[str]) -> None:
    platforms = jax.config.jax_platforms
    try:
        benchmark.main(["inception", "fid", "pr", "--size", "tiny", "--rounds", "1"])
    finally:
        jax.config.update("jax_platforms", platforms)
    _, _, *rows, memory = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in rows] == [
        *(["inception", side] for side in ("dsr_jax", "torch")),
        *([task, "dsr_jax"] for task in ("fid", "pr")),
    ]
    assert memory.startswith("pr: ") and "beyond its inputs" in memory


def test_differing_features_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_evaluation.InceptionSides, "__init__", lambda self: None)
    sides = benchmark_evaluation.InceptionSides()
    features = np.random.default_rng(0).random((2, 8), np.float32)
    monkeypatch.setattr(sides, "torch", lambda: lambda: torch.from_numpy(features))
    monkeypatch.setattr(sides, "ours", lambda: features)
    sides.check()
    monkeypatch.setattr(sides, "ours", lambda: features * 1.001)
    with pytest.raises(NumericsError, match="features differ"):
        sides.check()
