"""Training steps compiled for data-center GPUs, without having any."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.core.files import read_json
from dsr_jax.parallel.gpus import MEMORY_FRACTIONS
from dsr_jax.planning.memory import TEMPORARIES
from tests.requirements import require

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[1]
# The paper's small denoiser on latents of a 16 x 16 encoder.
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
    "--config.precision.compute=bfloat16",
)
IMAGES = 32
"""Per GPU."""


def compile_for_gpus(
    out: Path, topology: str, *words: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs the command on the digits config, changed by overrides."""
    require("jax_cuda13_plugin", "cuda")
    dropped = ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK", *MEMORY_FRACTIONS)
    own = {name: value for name, value in os.environ.items() if name not in dropped}
    command = (sys.executable, "-m", "dsr_jax.compile", "--config=configs/digits.py")
    return subprocess.run(
        [*command, f"--topology={topology}", f"--out={out}", *words],
        cwd=REPOSITORY,
        env=own | environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )


def facts(out: Path, topology: str, *words: str) -> dict[str, Any]:
    """The report of a step that fits."""
    done = compile_for_gpus(out, topology, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "GPU-hours" in done.stdout and "fits" in done.stdout
    assert "<html" in (out / "report.html").read_text()
    report = read_json(out / "report.json")
    assert report["fits"] and report["unknown_loops"] == 0
    assert 0 < report["hbm_bytes_per_chip"] < report["hbm_limit_bytes"] < 80 * 2**30
    assert 0 < report["mfu_bound"] < report["mfu_bound_of_compute_alone"]
    return report


def forward_flops() -> int:
    """Of one image."""
    config = configs.load(str(REPOSITORY / "configs" / "digits.py"), SMALL)
    return build.make_model(config, build.make_space(config)[0]).forward_flops()


def parts(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Parts by name."""
    return {part["name"]: part for part in report["parts"]}


def test_one_gpu_computes_what_the_formula_counts(tmp_path: Path) -> None:
    batch = f"--config.data.global_batch={IMAGES}"
    report = facts(tmp_path, "h100:1", *SMALL, batch, "--config.model.remat=none")
    assert (report["platform"], report["chips"], report["collectives"]) == ("gpu", 1, [])
    # cuBLAS's matmuls and cuDNN's attention: three forward passes, of which the gradient of the
    # network's input and cuDNN's fifth product of a backward pass make the difference.
    passes = report["flops_per_chip"] / (forward_flops() * IMAGES)
    assert 2.9 < passes < 3.2
    found = parts(report)
    layers = {
        f"{way} LightningDiT {stack}": trips
        for way in ("forward", "backward")
        for stack, trips in (("blocks_pre", 4), ("blocks_reg", 8))
    }
    assert {name: found[name]["trips"] for name in layers} == layers
    assert all(
        part["kernels"] >= 10 * part["trips"] for name, part in found.items() if name in layers
    )
    assert sum(part["kernels"] for part in found.values()) == report["kernels"]
    # All that is kept or moved in a step passes through memory.
    assert report["hbm_traffic_bytes"] > 2 * report["memory"][TEMPORARIES]
    assert 0 < report["matmul_traffic_bytes"] < report["hbm_traffic_bytes"]


def test_attention_of_the_fused_projection_moves_fewer_bytes(tmp_path: Path) -> None:
    # On several GPUs, since XLA cannot partition the kernels.
    words = (
        *SMALL,
        "--config.model.depth=2",
        "--config.registers.start=1",
        "--config.mesh.fsdp=8",
        f"--config.data.global_batch={8 * IMAGES}",
        "--config.model.remat=none",
        "--config.precision.residual=bfloat16",
    )
    reports = {}
    for kernel in ("cudnn", "triton"):
        out = tmp_path / kernel
        chosen = (f"--config.model.attention={kernel}", f"--hlo={tmp_path / kernel}.hlo")
        reports[kernel] = facts(out, "h100:8", *words, *chosen)
    text = (tmp_path / "triton.hlo").read_text()
    for way in ("forward", "backward"):
        calls = [line for line in text.splitlines() if f'name = "triton_attention_{way}"' in line]
        # One for each stack, on a GPU's own images.
        assert len(calls) == 2 and all(f"[{IMAGES},2" in call for call in calls)
    # Arrays [B, L, D] in bfloat16 that each block need not read or write: bias, slices and rotation
    # into three arrays and back, and gradients of the bias.
    saved = reports["cudnn"]["hbm_traffic_bytes"] - reports["triton"]["hbm_traffic_bytes"]
    assert saved > 15 * 2 * (IMAGES * 256 * 384 * 2)
    assert reports["triton"]["flops_per_chip"] > reports["cudnn"]["flops_per_chip"]


def test_triton_kernels_read_and_write_less(tmp_path: Path) -> None:
    """Those of the element-wise parts of a block, each once for both stacks of one block."""
    words = (*SMALL, "--config.model.depth=2", "--config.registers.start=1")
    words += (f"--config.data.global_batch={IMAGES}", "--config.model.remat=none")
    words += ("--config.precision.residual=bfloat16",)
    by_xla = facts(tmp_path / "xla", "h100:1", *words)
    program = tmp_path / "program.txt"
    words += ("--config.model.kernels=triton", f"--hlo={program}")
    by_triton = facts(tmp_path / "triton", "h100:1", *words)
    target = r'custom_call_target="__gpu\$xla.gpu.triton".*?op_name="([^"]*)"'
    calls = re.findall(target, program.read_text())
    parts = ("norm", "both", "residual", "swiglu", "norm_back", "both_back", "residual_back")
    for part in (*parts, "swiglu_back"):
        assert sum(f"/{part}_kernel/" in call or f"/{part}/" in call for call in calls) == 2, part
    assert by_triton["matmul_traffic_bytes"] <= by_xla["matmul_traffic_bytes"]
    assert by_triton["hbm_traffic_bytes"] < 0.95 * by_xla["hbm_traffic_bytes"]
    assert by_triton["kernels"] < by_xla["kernels"]


def test_eight_gpus_with_fsdp_gather_and_scatter_over_nvlink(tmp_path: Path) -> None:
    sharded = ("--config.mesh.fsdp=8", f"--config.data.global_batch={8 * IMAGES}")
    report = facts(tmp_path, "h100:8", *SMALL, *sharded, "--config.model.remat=full")
    assert (report["chips"], report["accelerator_type"]) == (8, "8 x NVIDIA H100 80GB HBM3")
    kinds = {row["kind"] for row in report["collectives"]}
    assert {"all-gather", "reduce-scatter"} <= kinds
    assert {row["network"] for row in report["collectives"]} == {"ICI"}
    whole = 8 * report["memory"]["parameters"]
    # Weights in bfloat16 are gathered in both passes, gradients reduced once.
    assert 0.5 * whole < report["sent_bytes"] < 4 * whole
    assert report["dcn_bytes"] == 0


def test_two_nodes_exchange_gradients_and_what_does_not_fit_is_advised(tmp_path: Path) -> None:
    """Each node holds the state, split over its own GPUs, of which JAX may take next to nothing."""
    words = ("--config.mesh.fsdp=8", "--config.model.hidden_size=128", "--config.model.depth=2")
    done = compile_for_gpus(
        tmp_path,
        "2xh100:8",
        *words,
        "--config.registers.start=1",
        **{MEMORY_FRACTIONS[0]: "0.0001"},
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert "2 nodes of 8 x NVIDIA H100" in done.stdout and "nodes over the network" in done.stdout
    assert "DOES NOT FIT" in done.stdout and f"{MEMORY_FRACTIONS[0]}=0.95" in done.stdout
    report = read_json(tmp_path / "report.json")
    assert (report["chips"], report["slices"], report["fits"]) == (16, 2, False)
    gradients = report["memory"]["parameters"]
    assert 0.9 * gradients < report["dcn_bytes"] < 3 * gradients
    assert any(row["network"] == "ICI" for row in report["collectives"])
