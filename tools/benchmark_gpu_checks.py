"""Checks of a machine before `tools/benchmark.py gpu`: what is missing, and what to install."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping

from dsr_jax.core.errors import ConfigError

DRY_RUN = "python tools/benchmark.py gpu --platform=cpu --size=tiny"

_JAX = """
import jax, jax.numpy as jnp
try:
    kinds = {device.platform for device in jax.devices()}
except Exception as error:
    raise SystemExit(f"PROBLEM jax-gpu {type(error).__name__}: {error}")
if kinds != {"gpu"}:
    raise SystemExit("PROBLEM jax-gpu it has " + ", ".join(sorted(kinds)))
x = jnp.ones((1, 64, 2, 64), jnp.bfloat16)
try:
    jax.block_until_ready(x[0, 0] @ x[0, 0].T)
except Exception as error:
    raise SystemExit(f"PROBLEM jax-run {error}")
try:
    jax.block_until_ready(jax.nn.dot_product_attention(x, x, x, implementation="cudnn"))
except Exception as error:
    raise SystemExit(f"PROBLEM cudnn {error}")
"""
_TORCH = """
try:
    import torch
except ImportError as error:
    raise SystemExit(f"PROBLEM torch {error}")
if torch.version.cuda is None:
    raise SystemExit(f"PROBLEM torch-cpu {torch.__version__}")
if not torch.cuda.is_available():
    raise SystemExit(f"PROBLEM torch-gpu {torch.__version__} for CUDA {torch.version.cuda}")
try:
    import triton
except ImportError as error:
    raise SystemExit(f"PROBLEM triton {error}")
"""
_TRANSFORMERS = """
try:
    import transformers
except ImportError as error:
    raise SystemExit(f"PROBLEM transformers {error}")
"""
_DRIVER = "NVIDIA's driver, which nvidia-smi shows"
_PROBLEMS: Mapping[str, tuple[str, str]] = {
    "jax-gpu": ("jax sees no GPU", f"install {_DRIVER}, and pip install 'dsr_jax[cuda]'"),
    "jax-run": (
        "jax sees a GPU on which nothing runs",
        f"end other programs on it, and check that {_DRIVER} is as new as CUDA's packages",
    ),
    "cudnn": (
        "cuDNN's attention does not run in jax",
        "pip install --upgrade 'dsr_jax[cuda]' has a cuDNN of its own, which a folder in "
        "LD_LIBRARY_PATH may hide",
    ),
    "torch": ("PyTorch cannot be imported", "install a PyTorch for CUDA"),
    "torch-cpu": ("PyTorch is built without CUDA", "install a PyTorch for CUDA in its place"),
    "torch-gpu": (
        "PyTorch sees no GPU",
        f"install {_DRIVER}, new enough for this PyTorch, or a PyTorch for an older CUDA",
    ),
    "triton": ("torch.compile needs triton", "pip install triton"),
    "transformers": (
        "the encoder's PyTorch side needs transformers",
        "pip install 'dsr_jax[hub]', or name only the rows train and sample",
    ),
}


def check_machine(encoders: bool) -> None:
    """Checks, in processes of their own, that both libraries can use this machine's GPU.

    Args:
      encoders: Whether rows of encoders are asked for, which need transformers.

    Raises:
      ConfigError: Naming what is missing.
    """
    programs = {"torch": _TORCH, "transformers": _TRANSFORMERS, "jax": _JAX}
    if not encoders:
        del programs["transformers"]
    for name, program in programs.items():
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise problem_error(name, done.returncode, done.stderr)
    if not any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))):
        raise ConfigError(
            "torch.compile needs a C compiler, and there is none on PATH",
            "install gcc, or name one in the environment variable CC",
        )


def problem_error(name: str, status: int, output: str) -> ConfigError:
    """Returns the error for a check that failed.

    Args:
      name: Library that was checked.
      status: Exit status of the check.
      output: Its stderr.
    """
    lines = [line for line in output.splitlines() if line.strip()]
    found = [line for line in lines if line.startswith("PROBLEM ")]
    if not found:
        shown = lines[-1] if lines else "no message"
        return ConfigError(
            f"{name} failed on this machine with exit status {status}: {shown[:300]}",
            f"make python -c 'import {name}' work; without a GPU: {DRY_RUN}",
        )
    _, key, detail = found[0].split(" ", 2)
    problem, remedy = _PROBLEMS[key]
    return ConfigError(f"{problem}: {detail[:300]}", f"{remedy}; without a GPU: {DRY_RUN}")
