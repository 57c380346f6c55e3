"""FLOPs agree with the paper's table and with the matmuls in the model's own program."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsr_jax.models.dit import DIT, REGISTER_START, LightningDiT
from dsr_jax.models.dit_dh import DIT_DH, DiTDH
from dsr_jax.models.jit import JIT, JiT
from dsr_jax.models.sit import SIT, SiT
from dsr_jax.telemetry.flops import mfu, peak_flops, train_step_flops

LATENTS: dict[str, int] = {"input_size": 16, "in_channels": 768, "num_classes": 1000}
PAPER = [("S", 12.4, 13.7), ("B", 46.6, 51.2), ("XL", 238.1, 262.9)]
"""GFLOPs of LightningDiT without and with registers (the paper's table)."""


@pytest.mark.parametrize(("size", "without", "with_registers"), PAPER)
def test_the_papers_table(size: str, without: float, with_registers: float) -> None:
    def gflops(num_registers: int) -> float:
        start = REGISTER_START[size]
        model = LightningDiT(
            **LATENTS, num_registers=num_registers, register_start=start, **DIT[size]
        )
        return round(model.forward_flops() / 1e9, 1)

    assert (gflops(0), gflops(36)) == (without, with_registers)


def test_the_head_models_figures() -> None:
    """GFLOPs of DiTDH-XL as its paper's convention gives them (spec denoiser 4)."""

    def gflops(num_registers: int) -> float:
        model = DiTDH(**LATENTS, num_registers=num_registers, register_start=8, **DIT_DH["XL"])
        return round(model.forward_flops() / 1e9, 2)

    assert (gflops(0), gflops(36)) == (323.16, 359.27)


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """All equations of a program with how often each runs."""
    for equation in jaxpr.eqns:
        inner_times = times * equation.params.get("length", 1)
        inner = [
            leaf for leaf in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
        ]
        for leaf in filter(_is_jaxpr, inner):
            yield from equations(getattr(leaf, "jaxpr", leaf), inner_times)
        yield equation, times


def _is_jaxpr(value: object) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def matmul_flops(function: Any, *args: Any) -> int:
    """Twice the multiply-accumulates of every matmul, scans unrolled."""
    total = 0
    for equation, times in equations(jax.make_jaxpr(function)(*args).jaxpr):
        assert "conv" not in equation.primitive.name
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            summed = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * times * summed * math.prod(equation.outvars[0].aval.shape)
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_registers": 4, "register_start": 2},
        {"num_registers": 9, "register_start": 0, "attn_kv_bias": True},
        {"use_swiglu": False, "learn_sigma": True, "patch_size": 2},
    ],
)
def test_the_models_own_matmuls(changes: dict[str, Any]) -> None:
    options = {"num_registers": 0, "register_start": 0, "use_swiglu": True, "patch_size": 1}
    options |= changes
    model = LightningDiT(
        input_size=6, in_channels=5, hidden_size=48, depth=5, num_heads=4, num_classes=3, **options
    )
    inputs = (jnp.zeros((1, 6, 6, 5)), jnp.zeros(1), jnp.zeros(1, int))
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    assert matmul_flops(model.apply, variables, *inputs) == model.forward_flops()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_registers": 4, "register_start": 2, "use_swiglu": False, "patch_size": 2},
        {"num_registers": 9, "decoder_hidden_size": 48},
        {"num_registers": 4, "register_start": 1, "register_gate": True},
    ],
)
def test_the_head_models_own_matmuls(changes: dict[str, Any]) -> None:
    model = DiTDH(
        **{
            "input_size": 6,
            "in_channels": 5,
            "hidden_size": 48,
            "depth": 3,
            "num_heads": 4,
            "num_classes": 3,
            "decoder_hidden_size": 96,
            "decoder_depth": 2,
            "decoder_num_heads": 6,
        }
        | changes
    )
    inputs = (jnp.zeros((1, 6, 6, 5)), jnp.zeros(1), jnp.zeros(1, int))
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    assert matmul_flops(model.apply, variables, *inputs) == model.forward_flops()


def test_sits_figures() -> None:
    """GFLOPs of SiT-XL/2 and the same with registers (spec denoiser 4), and what they cost."""

    def gflops(num_registers: int) -> float:
        model = SiT(
            input_size=32,
            in_channels=4,
            num_classes=1000,
            num_registers=num_registers,
            register_start=8,
            **SIT["XL"],
        )
        return model.forward_flops() / 1e9

    assert (round(gflops(0), 2), round(gflops(36), 2)) == (237.24, 261.99)
    assert round(gflops(36) / gflops(0) - 1, 3) == 0.104


@pytest.mark.parametrize("registers", [0, 4])
def test_sits_own_matmuls(registers: int) -> None:
    model = SiT(
        input_size=8,
        in_channels=4,
        hidden_size=48,
        depth=3,
        num_heads=4,
        num_classes=3,
        num_registers=registers,
        register_start=2 if registers else 0,
    )
    inputs = (jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), jnp.zeros(1, int))
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    assert matmul_flops(model.apply, variables, *inputs) == model.forward_flops()


@pytest.mark.parametrize(
    ("variant", "digits", "with_class_tokens", "without"),
    [("B-16", 2, 50.45, 46.4), ("L-16", 1, 175.9, 161.9), ("H-16", 1, 363.9, 334.3)],
)
def test_jits_figures(variant: str, digits: int, with_class_tokens: float, without: float) -> None:
    """GFLOPs of JiT with and without its class tokens (spec denoiser 4)."""

    def gflops(**changes: int) -> float:
        sizes = {**JIT[variant], **changes}
        return JiT(input_size=256, in_channels=3, num_classes=1000, **sizes).forward_flops() / 1e9

    assert round(gflops(), digits) == with_class_tokens
    assert round(gflops(num_class_tokens=0), 1) == without


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_registers": 4, "register_start": 2},
        {"num_registers": 4, "register_start": 0, "class_token_start": 3},
        {"num_class_tokens": 0, "num_registers": 4, "register_start": 1},
        {"num_registers": 4, "register_start": 2, "register_gate": True},
        {"num_class_tokens": 0},
    ],
)
def test_jits_own_matmuls(changes: dict[str, Any]) -> None:
    model = JiT(
        **{
            "input_size": 12,
            "in_channels": 3,
            "patch_size": 2,
            "hidden_size": 48,
            "depth": 4,
            "num_heads": 4,
            "num_classes": 3,
            "bottleneck_dim": 7,
            "num_class_tokens": 5,
            "class_token_start": 1,
        }
        | changes
    )
    inputs = (jnp.zeros((1, 12, 12, 3)), jnp.zeros(1), jnp.zeros(1, int))
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    assert matmul_flops(model.apply, variables, *inputs) == model.forward_flops()


def test_the_compilers_count_of_one_matmul() -> None:
    """Ties the unit, two operations per multiply-accumulate, to XLA's."""
    a, b = np.zeros((8, 16), np.float32), np.zeros((16, 32), np.float32)
    cost = jax.jit(jnp.matmul).lower(a, b).compile().cost_analysis()
    assert cost["flops"] == matmul_flops(jnp.matmul, a, b) == 2 * 8 * 16 * 32


def test_a_training_step_is_three_forward_passes() -> None:
    """Counted in the gradient of a chain of matmuls."""
    assert train_step_flops(10, 4) == 120
    assert train_step_flops(10, 4, recompute=True) == 160
    x, weights = jnp.zeros((8, 16)), jnp.zeros((50, 16, 16))

    def loss(weights: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, w: (h @ w, None), x, weights)[0].sum()

    forward = matmul_flops(loss, weights)
    assert matmul_flops(jax.grad(loss), weights) == train_step_flops(forward, 1)


def test_known_and_unknown_devices() -> None:
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5p") == peak_flops("TPU v5") == 459e12
    assert peak_flops("TPU v6 lite") == 918e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("cpu") is None


def test_mfu() -> None:
    assert mfu(275e12, 2.0, 4, "TPU v4") == 0.125
    assert mfu(275e12, 2.0, 4, "cpu") is None
