"""Training steps compiled for eight real TPU v5e chips, of 16 GiB each, without having any."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.core.files import read_json
from dsr_jax.planning.memory import TEMPORARIES
from tests.requirements import require

pytestmark = [pytest.mark.tpu, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[1]
FSDP = ("--config.mesh.data=1", "--config.mesh.fsdp=8")
# The paper's small denoiser on latents of a 16 x 16 encoder, with its batch.
SMALL = (
    "--config.model.hidden_size=384",
    "--config.model.depth=12",
    "--config.model.num_heads=6",
    "--config.model.patch_size=1",
    "--config.registers.num=36",
    "--config.registers.start=4",
    "--config.data.image_size=16",
    "--config.data.channels=768",
    "--config.data.num_classes=1000",
    "--config.data.global_batch=1024",
    "--config.precision.compute=bfloat16",
    # Splash pads its sequences and keeps no scores; what is computed and kept is counted here.
    "--config.model.attention=xla",
)


# A batch whose activations do not fit if all are kept.
TOO_LARGE = "--config.data.global_batch=1536"


def compile_for_tpu(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs the command on the digits config, changed by overrides."""
    require("libtpu", "tpu")
    command = (sys.executable, "-m", "dsr_jax.compile", "--config=configs/digits.py")
    return subprocess.run(
        [*command, "--topology=v5e:2x4", f"--out={out}", *words],
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"},
        capture_output=True,
        text=True,
        timeout=1800,
    )


def facts(out: Path, *words: str) -> dict[str, Any]:
    """The report of a step that fits."""
    done = compile_for_tpu(out, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "(8 chips, v5litepod-8)" in done.stdout and "fits" in done.stdout
    assert "<html" in (out / "report.html").read_text()
    report = read_json(out / "report.json")
    assert report["fits"] and report["chips"] == 8
    assert 0 < report["hbm_bytes_per_chip"] < report["hbm_limit_bytes"] < 16 * 2**30
    # The state's buffers are donated: it is updated in place.
    assert report["memory"].get("results", 0) < 0.05 * state_bytes(report)
    # By convention a backward pass costs two forward ones; this one spares the input's gradient.
    assert 0 < report["mfu_bound"] < report["mfu_bound_of_compute_alone"] < 1.05
    return report


def state_bytes(report: dict[str, Any]) -> int:
    """Of one chip."""
    return sum(report["memory"][name] for name in ("parameters", "optimizer", "EMA"))


def kinds(report: dict[str, Any]) -> set[str]:
    """Collectives that occur."""
    return {row["kind"] for row in report["collectives"]}


def test_data_parallel_devices_only_sum(tmp_path: Path) -> None:
    """Each holds the whole state; gradients and metrics are all that travels."""
    report = facts(tmp_path)
    assert kinds(report) == {"all-reduce"}
    gradients = report["memory"]["parameters"]
    assert 0.95 * gradients < sum(row["bytes"] * row["count"] for row in report["collectives"])


def test_fsdp_gathers_and_fits(tmp_path: Path) -> None:
    """Each device holds an eighth of the state, and gathers parameters where they are used."""
    report = facts(
        tmp_path, *SMALL, *FSDP, "--config.model.remat=full", "--config.model.unroll=none"
    )
    config = configs.load(str(REPOSITORY / "configs" / "digits.py"), SMALL)
    model = build.make_model(config, build.make_space(config)[0])
    assert kinds(report) & {"all-gather", "collective-permute"}
    # What is recomputed is a fourth forward pass, and nothing else is.
    images = 1024 / 8
    passes = report["flops_per_chip"] / (model.forward_flops() * images)
    assert 3.9 < passes < 4.1
    trips = [part["trips"] for part in report["parts"]]
    assert trips == [4, 8, 8, 4, 1]


def test_slices_exchange_gradients_alone(tmp_path: Path) -> None:
    """Each holds the state, split over its own chips; a chip sums about its own part with
    another's, not the whole of the gradients, which is eight times as much."""
    fsdp = "--config.mesh.fsdp=8"
    done = compile_for_tpu(tmp_path, fsdp, "--topology=2xv5e:2x4", "--config.model.hidden_size=128")
    assert done.returncode == 0, done.stderr[-2000:]
    report = read_json(tmp_path / "report.json")
    assert (report["chips"], report["slices"]) == (16, 2)
    crossing = [row for row in report["collectives"] if row["network"] == "DCN"]
    assert {(row["kind"], row["group"]) for row in crossing} == {("all-reduce", 2)}
    gradients = report["memory"]["parameters"]
    assert 0.9 * gradients < report["dcn_bytes"] < 2 * gradients
    assert any(row["network"] == "ICI" for row in report["collectives"])


def test_what_does_not_fit_ends_with_figures_and_advice(tmp_path: Path) -> None:
    """The same step that keeps all it computes."""
    kept = ("--config.model.remat=none", "--config.model.unroll=none")
    done = compile_for_tpu(tmp_path, *SMALL, *FSDP, *kept, TOO_LARGE)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "DOES NOT FIT" in done.stdout and "--config.model.remat=dots" in done.stdout
    report = read_json(tmp_path / "report.json")
    assert not report["fits"] and report["step_seconds_estimate"] is None
    assert report["hbm_bytes_per_chip"] > report["hbm_limit_bytes"] > 15 * 2**30
    assert report["memory"][TEMPORARIES] > state_bytes(report) and report["advice"]


def test_auto_takes_a_policy_that_fits(tmp_path: Path) -> None:
    report = facts(tmp_path, *SMALL, *FSDP, "--config.model.unroll=none", TOO_LARGE)
    assert report["remat"].startswith(("dots (auto: none needs", "full (auto: none needs"))


def test_a_sampler_fits_too(tmp_path: Path) -> None:
    done = compile_for_tpu(tmp_path, "--sampler", "--config.sample.batch=64")
    assert done.returncode == 0, done.stderr[-2000:]
    report = read_json(tmp_path / "report.json")
    assert report["what"] == "sampler" and report["images_per_chip"] == 8
