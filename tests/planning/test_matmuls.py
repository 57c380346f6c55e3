"""FLOPs of compiled matmuls, convolutions and attention kernels."""

import jax
import jax.numpy as jnp
import pytest

from dsr_jax.planning.hlo import parse
from dsr_jax.planning.program_cost import split_program, total


def flops(text: str) -> float:
    """FLOPs of the whole program."""
    return total(split_program(parse(text))).flops


@pytest.mark.parametrize(
    ("convolution", "products"),
    [
        ("convolution(%a, %b), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", (3 * 16 - 2) * 8),
        # A batched product as TPUs have it: every window hits one of the dilated inputs.
        (
            "convolution(%a, %b), window={size=16 stride=15 pad=0_0 lhs_dilate=16}, "
            "dim_labels=b0f_0io->b0f",
            16 * 8,
        ),
    ],
)
def test_padding_and_holes_cost_nothing(convolution: str, products: int) -> None:
    size = 3 if "size=3" in convolution else 16
    text = (
        "ENTRY %main (a: f32[2,16,4], b: f32[3,4,8]) -> f32[2,16,8] {\n"
        "  %a = f32[2,16,4]{2,1,0} parameter(0)\n"
        f"  %b = f32[{size},4,8]{{2,1,0}} parameter(1)\n"
        f"  ROOT %c = f32[2,16,8]{{2,1,0}} {convolution}\n"
        "}\n"
    )
    assert flops(text) == 2 * 2 * 4 * products


@pytest.mark.parametrize(("kernel", "products"), [("fwd_no_residuals", 2), ("dkv_segmented", 5)])
def test_splash_kernels_count_their_matmuls(kernel: str, products: int) -> None:
    text = (
        "ENTRY %main (q: bf16[2,4,384,72], k: bf16[2,4,256,72]) -> bf16[2,4,384,72] {\n"
        "  %table = s8[1,1,1]{2,1,0} constant({...})\n"
        "  %q = bf16[2,4,384,72]{3,2,1,0} parameter(0)\n"
        "  %k = bf16[2,4,256,72]{3,2,1,0} parameter(1)\n"
        f"  ROOT %splash_mha_{kernel}.1 = bf16[2,4,384,72]{{3,2,1,0}} "
        'custom-call(%table, %q, %k, %k), custom_call_target="tpu_custom_call"\n'
        "}\n"
    )
    assert flops(text) == products * 2 * (2 * 4) * 384 * 256 * 72


@pytest.mark.parametrize(
    ("kernel", "products"), [("attention_forward", 2), ("attention_backward", 7), ("norm", 0)]
)
def test_triton_attention_counts_its_matmuls(kernel: str, products: int) -> None:
    text = (
        "ENTRY %main (qkv: bf16[2,292,12,72]) -> bf16[2,292,4,72] {\n"
        "  %qkv = bf16[2,292,12,72]{3,2,1,0} parameter(0)\n"
        "  ROOT %pallas_call.1 = bf16[2,292,4,72]{3,2,1,0} custom-call(%qkv), "
        'custom_call_target="__gpu$xla.gpu.triton", '
        f'backend_config={{grid_x = 5 : i32, name = "triton_{kernel}"}}\n'
        "}\n"
    )
    assert flops(text) == products * 2 * (2 * 4) * 292**2 * 72


@pytest.mark.parametrize("target", ["__cublas$lt$matmul", "__cublas$gemm"])
def test_cublas_matmuls_count_by_their_contracted_axes(target: str) -> None:
    config = (
        'backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
        '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],'
        '"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},"epilogue":"BIAS"}}'
    )
    text = (
        "ENTRY %main (a: bf16[64,48], b: bf16[48,32]) -> bf16[64,32] {\n"
        "  %a = bf16[64,48]{1,0} parameter(0)\n"
        "  %b = bf16[48,32]{1,0} parameter(1)\n"
        "  %c = (bf16[64,32]{1,0}, s8[33554432]{0}) custom-call(%a, %b), "
        f'custom_call_target="{target}", {config}\n'
        "  ROOT %d = bf16[64,32]{1,0} get-tuple-element(%c), index=0\n"
        "}\n"
    )
    cost = total(split_program(parse(text, gpus=1)))
    assert cost.flops == 2 * 64 * 48 * 32
    # The library's scratch space is not traffic.
    assert cost.hbm_bytes == cost.matmul_bytes == 2 * (64 * 48 + 48 * 32 + 64 * 32)
    assert cost.kernels == 1


@pytest.mark.parametrize(("name", "products"), [("Softmax", 2), ("SoftmaxBackward", 5)])
def test_cudnn_attention_counts_its_matmuls(name: str, products: int) -> None:
    config = (
        'backend_config={"cudnn_fmha_backend_config": {"fmha_scale": 0.125, '
        '"intermediate_tensor_shape": {"element_type": "BF16", '
        '"dimensions": ["4", "6", "292", "256"], "tuple_shapes": []}}}'
    )
    text = (
        "ENTRY %main (q: bf16[4,292,6,64], k: bf16[4,256,6,64]) -> bf16[4,6,292,64] {\n"
        "  %q = bf16[4,292,6,64]{3,2,1,0} parameter(0)\n"
        "  %k = bf16[4,256,6,64]{3,2,1,0} parameter(1)\n"
        "  %a = (bf16[4,6,292,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), "
        f'custom_call_target="__cudnn$fmha{name}", {config}\n'
        "  ROOT %b = bf16[4,6,292,64]{3,1,2,0} get-tuple-element(%a), index=0\n"
        "}\n"
    )
    assert flops(text) == products * 2 * (4 * 6) * 292 * 256 * 64


@pytest.mark.parametrize(
    ("target", "operands", "result"),
    [
        ("Forward", ("image", "kernel"), "out"),
        ("BackwardInput", ("out", "kernel"), "image"),
        ("BackwardFilter", ("image", "out"), "kernel"),
    ],
)
def test_cudnn_convolutions_and_their_gradients_cost_the_same(
    target: str, operands: tuple[str, str], result: str
) -> None:
    shapes = {"image": "f32[2,16,16,4]", "kernel": "f32[3,3,4,8]", "out": "f32[2,16,16,8]"}
    first, second = (shapes[name] for name in operands)
    text = (
        f"ENTRY %main (a: {first}, b: {second}) -> {shapes[result]} {{\n"
        f"  %a = {first}{{3,2,1,0}} parameter(0)\n"
        f"  %b = {second}{{3,2,1,0}} parameter(1)\n"
        f"  %c = ({shapes[result]}{{3,2,1,0}}, u8[0]{{0}}) custom-call(%a, %b), "
        "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, "
        f'custom_call_target="__cudnn$conv{target}"\n'
        f"  ROOT %d = {shapes[result]}{{3,2,1,0}} get-tuple-element(%c), index=0\n"
        "}\n"
    )
    assert flops(text) == 2 * 2 * 4 * 8 * (3 * 16 - 2) ** 2


def test_matmuls_agree_with_xla_where_nothing_is_scanned() -> None:
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.einsum("bli,io->blo", x, w) @ w.T)

    w, x = jnp.zeros((64, 128)), jnp.zeros((4, 32, 64))
    compiled = jax.jit(jax.grad(loss)).lower(w, x).compile()
    ours = flops(compiled.as_text())
    theirs = compiled.cost_analysis()["flops"]
    # They count additions, too.
    assert 0.95 * theirs < ours <= theirs
