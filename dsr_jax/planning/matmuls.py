"""FLOPs of the matmuls, convolutions and attention kernels of a compiled program."""

from __future__ import annotations

import math
import re

import numpy as np

from dsr_jax.planning.hlo import Array, Computation, Instruction


def flops(computation: Computation, instruction: Instruction) -> float:
    """Returns the FLOPs of an instruction, two per multiply-accumulate; 0 if it is no matmul.

    Matmuls are dots, convolutions, cuBLAS's matmuls, cuDNN's convolutions and attention, and
    attention by splash's and this project's kernels, of which XLA itself counts the first two.
    """
    if instruction.opcode == "dot":
        contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
        return _dot_flops(computation, instruction, contracted)
    if instruction.opcode == "convolution":
        image = computation.operand_arrays(instruction)[0]
        return _convolution_flops(instruction, image, instruction.arrays[0])
    if instruction.opcode != "custom-call":
        return 0
    if instruction.target.startswith("__cublas$"):
        contracted = instruction.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
        return _dot_flops(computation, instruction, contracted.replace('"', ""))
    if instruction.target.startswith("__cudnn$fmha"):
        return _cudnn_attention_flops(computation, instruction)
    if instruction.target.startswith("__cudnn$conv"):
        return _cudnn_convolution_flops(computation, instruction)
    if instruction.target == "__gpu$xla.gpu.triton":
        return _triton_attention_flops(computation, instruction)
    return _splash_flops(computation, instruction)


def _dot_flops(computation: Computation, instruction: Instruction, contracted: str) -> float:
    lhs = computation.operand_arrays(instruction)[0]
    depth = math.prod(lhs.shape[int(axis)] for axis in contracted.split(",") if axis)
    return 2 * depth * math.prod(instruction.arrays[0].shape)


_FORWARD_MATMULS, _BACKWARD_MATMULS = 2, 5
"""Matmuls of queries x keys x channels in attention: the backward pass computes scores again."""


def _splash_flops(computation: Computation, instruction: Instruction) -> float:
    """Returns the FLOPs of a splash kernel, including padding; its dkv has all gradients."""
    kernel = re.match(r"splash_mha_(fwd|dkv)", instruction.name)
    if kernel is None:
        return 0
    # Queries [B, H, L, K] come before keys [B, H, M, K]; all other operands have fewer axes.
    q, k = [a for a in computation.operand_arrays(instruction) if len(a.shape) == 4][:2]
    matmuls = _FORWARD_MATMULS if kernel.group(1) == "fwd" else _BACKWARD_MATMULS
    return 2 * matmuls * math.prod(q.shape) * k.shape[2]


def _triton_attention_flops(computation: Computation, instruction: Instruction) -> float:
    """Returns the FLOPs of kernels of `models.triton_attention`; of other Triton kernels 0.

    Their backward pass computes scores and the gradients of weights twice, for queries and keys.
    """
    kernel = instruction.attribute(r"triton_attention_(forward|backward)")
    if not kernel:
        return 0
    batch, length, heads, channels = computation.operand_arrays(instruction)[0].shape
    matmuls = _FORWARD_MATMULS if kernel == "forward" else _BACKWARD_MATMULS + 2
    return 2 * matmuls * batch * (heads // 3) * length**2 * channels


def _cudnn_attention_flops(computation: Computation, instruction: Instruction) -> float:
    """Returns the FLOPs of cuDNN's attention; it records the shape [B, H, L, M] of the scores."""
    scores = instruction.attribute(
        r'"intermediate_tensor_shape": ?\{[^}]*?"dimensions": ?\[([^\]]*)\]'
    )
    channels = computation.operand_arrays(instruction)[0].shape[-1]
    backward = "Backward" in instruction.target
    matmuls = _BACKWARD_MATMULS if backward else _FORWARD_MATMULS
    return 2 * matmuls * channels * math.prod(map(int, re.findall(r"\d+", scores)))


def _cudnn_convolution_flops(computation: Computation, instruction: Instruction) -> float:
    """Returns the FLOPs of a convolution or its gradients, all described by the forward one."""
    first, second = computation.operand_arrays(instruction)[:2]
    result = instruction.arrays[0]
    if "BackwardInput" in instruction.target:
        return _convolution_flops(instruction, result, first)
    if "BackwardFilter" in instruction.target:
        return _convolution_flops(instruction, first, second)
    return _convolution_flops(instruction, first, result)


def _convolution_flops(instruction: Instruction, image: Array, out: Array) -> float:
    """Returns the FLOPs of a convolution as XLA counts them.

    Padding and gaps between dilated inputs cost nothing. This matters on TPUs, whose compiler turns
    a batched matmul into a convolution over the batch with windows that each contain one input.
    """
    labels = instruction.attribute(r"dim_labels=(\S+?)(?:,|$)")
    inputs, _, outputs = re.split(r"_|->", labels)
    window = dict(re.findall(r"(\w+)=(\S+)", instruction.attribute(r"window=\{([^}]*)\}")))
    positions = 1
    for axis in sorted(label for label in outputs if label.isdigit()):
        index = int(axis)
        side = image.shape[inputs.index(axis)]
        count = out.shape[outputs.index(axis)]
        size, stride, holes, dilation = (
            int(window[key].split("x")[index]) if key in window else 1
            for key in ("size", "stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(window["pad"].split("x")[index].split("_")[0]) if "pad" in window else 0
        indices = np.arange(count)[:, None] * stride + np.arange(size) * dilation - low
        inside = (indices >= 0) & (indices <= (side - 1) * holes) & (indices % holes == 0)
        positions *= int(inside.sum())
    groups = 1
    for key in ("feature_group_count", "batch_group_count"):
        groups *= int(instruction.attribute(rf"{key}=(\d+)") or 1)
    batch, features = (image.shape[inputs.index(label)] for label in "bf")
    out_features = out.shape[outputs.index("f")]
    return 2 * batch * features * out_features * positions / groups
