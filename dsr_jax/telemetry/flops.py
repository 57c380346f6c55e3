"""Analytic floating-point operations, and the share of the hardware's peak that they reach.

Counted are matrix products, two operations per multiply-accumulate; norms, softmax and
element-wise work are not. XLA's own count cannot replace this: it counts a scanned block once.

Source: paper, table of GFLOPs (reproduced exactly); spec denoiser 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dsr_jax.parallel.topologies import CHIPS

TIME_FEATURES = 512
"""Width of the Fourier features that enter the time MLP."""

_TPUS: Mapping[str, float] = MappingProxyType(
    {
        name: chip.peak_flops
        for chip in CHIPS.values()
        for name in (chip.device_kind, f"TPU {chip.generation}")
    }
)

PEAK_FLOPS: Mapping[str, float] = MappingProxyType(
    {
        **{name: _TPUS[name] for name in sorted(_TPUS, key=len, reverse=True)},
        "NVIDIA A100": 312e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 NVL": 835e12,
        "NVIDIA H100 80GB": 989e12,
        "NVIDIA H200 NVL": 835e12,
        "NVIDIA H200": 989e12,
    }
)
"""Dense bfloat16 FLOP/s of one device, by the beginning of JAX's `device_kind`; the first that fits
counts, so longer names stand before their beginnings. Source: the makers' data sheets."""


def dit_forward_flops(
    *,
    hidden: int,
    depth: int,
    mlp_hidden: int,
    tokens: int,
    patch_inputs: int,
    patch_outputs: int,
    num_registers: int = 0,
    register_start: int = 0,
    register_gate: bool = False,
    use_swiglu: bool = True,
    attn_kv_bias: bool = False,
    bottleneck: int = 0,
    num_class_tokens: int = 0,
    class_token_start: int = 0,
    time_features: int = TIME_FEATURES,
) -> int:
    """FLOPs of one network evaluation of LightningDiT, SiT or JiT on one sample.

    The number of heads does not matter.

    Args:
      hidden: Width D.
      depth: Blocks.
      mlp_hidden: Hidden units M of the feed-forward.
      tokens: Patch tokens N.
      patch_inputs: Numbers p*p*C that make a token.
      patch_outputs: Numbers p*p*C (twice that with learn_sigma) that come out of one.
      num_registers: Register tokens R.
      register_start: First block that sees the registers.
      register_gate: Attention runs a second time, without the registers, where there are any.
      use_swiglu: Three matrices in the feed-forward, else two.
      attn_kv_bias: One learned key and value more in every block.
      bottleneck: Width between patches and tokens, 0 for none.
      num_class_tokens: Class tokens.
      class_token_start: First block that sees them.
      time_features: Inputs of the time MLP.
    """
    sizes: Any = {
        "hidden": hidden,
        "mlp_hidden": mlp_hidden,
        "use_swiglu": use_swiglu,
        "attn_kv_bias": attn_kv_bias,
    }
    joined = ((num_registers, register_start), (num_class_tokens, class_token_start))
    blocks = sum(
        _block(
            tokens + sum(count for count, start in joined if i >= start),
            1,
            gated=num_registers if register_gate and i >= register_start else 0,
            **sizes,
        )
        for i in range(depth)
    )
    entrance = bottleneck * (patch_inputs + hidden) if bottleneck else patch_inputs * hidden
    ends = tokens * (entrance + hidden * patch_outputs) + 2 * hidden**2
    return 2 * (blocks + ends + _time(hidden, time_features))


def dit_dh_forward_flops(
    *,
    hidden: int,
    depth: int,
    mlp_hidden: int,
    decoder_hidden: int,
    decoder_depth: int,
    decoder_mlp_hidden: int,
    tokens: int,
    patch_inputs: int,
    num_registers: int = 0,
    register_start: int = 0,
    register_gate: bool = False,
    use_swiglu: bool = True,
    time_features: int = TIME_FEATURES,
) -> int:
    """FLOPs of one network evaluation of DiTDH on one sample.

    The head's modulations are of each token, and so cost as many products as it has tokens.

    Args:
      hidden: Width D of the encoder.
      depth: Its blocks.
      mlp_hidden: Hidden units of its feed-forward.
      decoder_hidden: Width E of the head.
      decoder_depth: Its blocks.
      decoder_mlp_hidden: Hidden units of its feed-forward.
      tokens: Patch tokens N.
      patch_inputs: Numbers p*p*C that make a token, and that come out of one.
      num_registers: Register tokens R of either part.
      register_start: First block of the encoder that sees its registers.
      register_gate: Attention runs a second time, without the registers, where there are any.
      use_swiglu: Three matrices in the feed-forward, else two.
      time_features: Inputs of the time MLP.
    """
    length = tokens + num_registers
    before = min(register_start, depth) if num_registers else depth
    encoder: Any = {"hidden": hidden, "mlp_hidden": mlp_hidden, "use_swiglu": use_swiglu}
    gated = num_registers if register_gate else 0
    blocks = before * _block(tokens, 1, **encoder)
    blocks += (depth - before) * _block(length, 1, gated=gated, **encoder)
    blocks += decoder_depth * _block(
        length,
        length,
        hidden=decoder_hidden,
        mlp_hidden=decoder_mlp_hidden,
        use_swiglu=use_swiglu,
        gated=gated,
    )
    # Both parts see the input; only the head's patches reach the final layer.
    ends = tokens * (patch_inputs * (hidden + 2 * decoder_hidden) + 2 * decoder_hidden**2)
    projector = length * hidden * decoder_hidden if hidden != decoder_hidden else 0
    return 2 * (blocks + ends + projector + _time(hidden, time_features))


def _block(
    length: int,
    conditions: int,
    *,
    hidden: int,
    mlp_hidden: int,
    use_swiglu: bool,
    attn_kv_bias: bool = False,
    gated: int = 0,
) -> int:
    """Multiply-accumulates of a block on `length` tokens with so many different conditions.

    Of the tokens `gated` are registers behind a gate: all attend a second time, but not to them.
    """
    matrices = 3 if use_swiglu else 2
    keys = length + int(attn_kv_bias)
    projections = length * (4 * hidden**2 + matrices * hidden * mlp_hidden)
    attended = keys + (keys - gated if gated else 0)
    return projections + 2 * length * attended * hidden + 6 * conditions * hidden**2


def _time(hidden: int, features: int) -> int:
    return features * hidden + hidden**2


def train_step_flops(forward_flops: int, batch: int, *, recompute: bool = False) -> int:
    """FLOPs of one training step: the backward pass costs two forward passes.

    Args:
      forward_flops: Of one sample.
      batch: Samples per step.
      recompute: Counts the forward pass that full rematerialisation repeats. MFU is defined
        without it: recomputing is work of the hardware, not of the model.
    """
    return (4 if recompute else 3) * forward_flops * batch


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device, or None if it is not known."""
    for beginning, peak in PEAK_FLOPS.items():
        if device_kind.lower().startswith(beginning.lower()):
            return peak
    return None


def mfu(step_flops: float, step_seconds: float, num_devices: int, device_kind: str) -> float | None:
    """Model FLOPs utilisation: share of the devices' bfloat16 peak, 0 to 1.

    Args:
      step_flops: `train_step_flops` without recomputation, over the global batch.
      step_seconds: Time of a step.
      num_devices: Devices that share the step.
      device_kind: Their `jax.Device.device_kind`.

    Returns:
      None if the device's peak is not known, as on a CPU.
    """
    peak = peak_flops(device_kind)
    if peak is None or step_seconds <= 0:
        return None
    return step_flops / (step_seconds * num_devices * peak)
