"""Bytes through memory, and kernels, of instructions in the words of XLA's GPU compiler."""

import pytest

from dsr_jax.planning.hlo import parse
from dsr_jax.planning.program_cost import split_program, total

# Reads a row of the stacked weights, adds it to x, and writes the sum into a stacked buffer.
TEXT = """
%write (buffer: f32[8,4,16], x: f32[4,16], weights: f32[8,16], i: s32[]) -> f32[8,4,16] {
  %buffer = f32[8,4,16]{2,1,0} parameter(0)
  %x = f32[4,16]{1,0} parameter(1)
  %weights = f32[8,16]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %zero = s32[] constant(0)
  %row = f32[1,16]{1,0} dynamic-slice(%weights, %i, %zero), dynamic_slice_sizes={1,16}
  %rows = f32[4,16]{1,0} broadcast(%row), dimensions={0,1}
  %sum = f32[4,16]{1,0} add(%x, %rows)
  %part = f32[1,4,16]{2,1,0} bitcast(%sum)
  ROOT %out = f32[8,4,16]{2,1,0} dynamic-update-slice(%buffer, %part, %i, %zero, %zero)
}

ENTRY %main (buffer: f32[8,4,16], x: f32[4,16], weights: f32[8,16], i: s32[]) -> f32[8,4,16] {
  %buffer = f32[8,4,16]{2,1,0} parameter(0)
  %x = f32[4,16]{1,0} parameter(1)
  %weights = f32[8,16]{1,0} parameter(2)
  %i = s32[] parameter(3)
  WRITE
}
"""
DIRECT = "ROOT %w = f32[8,4,16]{2,1,0} fusion(%buffer, %x, %weights, %i), kind=kLoop, calls=%write"
ASYNCHRONOUS = """
  %begin = ((f32[8,4,16]{2,1,0}, f32[4,16]{1,0}, f32[8,16]{1,0}, s32[]), f32[8,4,16]{2,1,0}, u32[])
 fusion-start(%buffer, %x, %weights, %i), kind=kLoop, calls=%write
  ROOT %end = f32[8,4,16]{2,1,0} fusion-done(%begin)
""".replace("u32[])\n", "u32[])")


@pytest.mark.parametrize("write", [DIRECT, ASYNCHRONOUS])
def test_a_fusion_moves_the_slices_that_it_reads_and_writes(write: str) -> None:
    cost = total(split_program(parse(TEXT.replace("WRITE", write), gpus=1)))
    x, row, number = 4 * 16 * 4, 16 * 4, 4
    assert cost.hbm_bytes == x + row + number + x
    assert (cost.kernels, cost.matmul_bytes) == (1, 0)


@pytest.mark.parametrize(("space", "gpus", "counts"), [(1, 8, True), (5, 8, False), (1, 0, False)])
def test_memory_registered_for_nccl_is_main_memory_and_the_hosts_is_not(
    space: int, gpus: int, counts: bool
) -> None:
    text = (
        "ENTRY %main (a: f32[64]) -> f32[64] {\n"
        "  %a = f32[64]{0} parameter(0)\n"
        f"  ROOT %b = f32[64]{{0:S({space})}} negate(%a)\n"
        "}\n"
    )
    assert total(split_program(parse(text, gpus=gpus))).hbm_bytes == 256 * (1 + counts)
