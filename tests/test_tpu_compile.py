"""Training steps compiled for eight real TPU v5e chips, of 16 GiB each, without having any."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.requirements import require

pytestmark = [pytest.mark.tpu_aot, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[1]
TOPOLOGY = "v5e:2x4"
MEMORY = 16 * 2**30
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
    "--config.mesh.data=1",
    "--config.mesh.fsdp=8",
)


def compile_step(*overrides: str) -> subprocess.CompletedProcess[str]:
    """Compiles the step of the digits config, changed by overrides."""
    require("libtpu", "tpu")
    script = REPOSITORY / "tests" / "compile_for_tpu.py"
    return subprocess.run(
        [sys.executable, str(script), TOPOLOGY, "configs/digits.py", *overrides],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=1800,
    )


def facts(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What the script found out."""
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["device_kind"] == "TPU v5 lite" and found["devices"] == 8
    assert 0 < found["peak_bytes"] < MEMORY
    # The state's buffers are donated: it is updated in place.
    assert found["alias_bytes"] > 0.95 * found["output_bytes"]
    return found


def test_data_parallel_devices_only_sum() -> None:
    """Each holds the whole state; gradients and metrics are all that travels."""
    found = facts(compile_step())
    assert found["argument_bytes"] > found["state_bytes"]
    traffic = {name for name, count in found["collectives"].items() if count}
    assert traffic == {"all-reduce"}


def test_fsdp_gathers_and_fits() -> None:
    """Each device holds an eighth of the state, and gathers parameters where they are used."""
    found = facts(compile_step(*SMALL, "--config.model.remat=full"))
    batch = 1024 // 8 * (16 * 16 * 768 + 8)
    assert found["argument_bytes"] < 1.3 * found["state_bytes"] / 8 + batch
    assert found["collectives"]["all-gather"] > 0
    assert found["bfloat16_products"] > 0


def test_the_compiler_refuses_what_does_not_fit() -> None:
    """Else the sizes above would say nothing: the same step that keeps all it computes."""
    done = compile_step(*SMALL)
    assert done.returncode != 0
    assert "RESOURCE_EXHAUSTED: Ran out of memory on HBM" in done.stderr
