"""Choices by platform that change the speed of a program and not its results, all in one place.

The figures behind those for CPUs are in docs/performance.md; those for GPUs are counted in compiled
programs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax


@dataclass(frozen=True)
class Tuning:
    """Choices for one platform.

    Attributes:
      query_rows: Queries per block of einsum attention; 0 for all at once. XLA's CPU backend fuses
        both matmuls and the softmax into one loop up to 256 queries: one more doubles the time,
        two halves take a third more.
      pad_convolutions: Computes one column more than a convolution without padding needs, and
        drops it: XLA's CPU convolutions take half the time with some padding.
      separate_outputs: Computes the outputs of a fused kernel (q, k and v) by a matmul each. In the
        backward pass of a single matmul XLA's CPU backend first concatenates the gradients of the
        outputs, a quarter of a feed-forward layer's time. Plans for TPUs are made with it, too.
      flat_bias: Adds a bias to the matrix of a matmul's results, before heads become a dimension of
        their own. XLA's GPU backend gives such a vector to cuBLAS, where it writes and reads an N-D
        bias as large as the result. On a TPU the backward pass moves a tenth more memory then.
      swap_by_matmul: Swaps the two channels of a pair, for rotary positions, by a matmul with a
        constant. A TPU stores a dimension of two channels in tiles of 128, so arrays of pairs are
        written in float32 and copied: a seventh of the traffic of a step of RAE-DiT-XL.
      row_major: Stores the residual stream and its gradient in the order of their dimensions. Left
        alone, XLA's GPU backend stores them with tokens last, for the sake of sums over tokens, and
        transposes float32 copies back and forth: a third of a step's element-wise traffic.
      xla_options: Compiler options of a training step. With excess precision, XLA leaves out the
        rounding of a bfloat16 residual stream to bfloat16, and writes and reads float32 copies.
      unroll_width: Width of the smallest networks whose depth is unrolled; narrower ones are one
        block in a loop. A loop writes what the backward pass needs into buffers stacked by layer
        and copies slices out of them: on a GPU a tenth of a step and half of its memory, on a CPU
        a quarter of the digits' step. Toy networks, as those of the tests, take a CPU's compiler
        more than twice as long unrolled, which their runs do not repay.
      unroll_remat: Unrolls blocks that are recomputed in the backward pass, too. A TPU's compiler
        takes over ten minutes for RAE-DiT-XL with everything recomputed, three as a loop, and a
        loop stacks little then.
      sampler_options: Compiler options of a sampler. Merging matmuls of one input, as those of the
        modulations are, XLA's GPU backend concatenates their weights in each evaluation.
      unstack: Splits unrolled stacks into layers before a sampler's loop, see `models.unstacked`.
        XLA's GPU backend slices and converts all weights in each evaluation else.
    """

    query_rows: int
    pad_convolutions: bool
    separate_outputs: bool
    unroll_width: int
    unroll_remat: bool = True
    flat_bias: bool = False
    swap_by_matmul: bool = False
    unstack: bool = False
    row_major: bool = False
    xla_options: tuple[tuple[str, Any], ...] = ()
    sampler_options: tuple[tuple[str, Any], ...] = ()


TUNING: Mapping[str, Tuning] = MappingProxyType(
    {
        "cpu": Tuning(
            query_rows=256, pad_convolutions=True, separate_outputs=True, unroll_width=64
        ),
        "gpu": Tuning(
            query_rows=0,
            pad_convolutions=False,
            separate_outputs=False,
            unroll_width=0,
            row_major=True,
            flat_bias=True,
            unstack=True,
            xla_options=(("xla_allow_excess_precision", False),),
            sampler_options=(("xla_gpu_dot_merger_threshold_mb", 0),),
        ),
        "tpu": Tuning(
            query_rows=0,
            pad_convolutions=False,
            separate_outputs=True,
            unroll_width=0,
            unroll_remat=False,
            swap_by_matmul=True,
        ),
    }
)


def target_platform() -> str:
    """Returns the platform of the traced program: that of `jax.set_mesh`, else of this process.

    They differ if a CPU compiles ahead of time for other devices.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def tuning(platform: str = "") -> Tuning:
    """Returns the choices for a platform, by default that of the traced program."""
    return TUNING.get(platform or target_platform(), TUNING["gpu"])
