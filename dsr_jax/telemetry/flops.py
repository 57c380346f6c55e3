"""FLOPs of a training step, and model FLOPs utilization (MFU).

A network counts the FLOPs of its forward pass in `forward_flops` (`models.denoiser.Denoiser`).
"""

from collections.abc import Mapping
from types import MappingProxyType

from dsr_jax.parallel.gpus import CARDS
from dsr_jax.parallel.topologies import CHIPS

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
        "NVIDIA A100": CARDS["a100"].peak_flops,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 NVL": 835e12,
        "NVIDIA H100 80GB": CARDS["h100"].peak_flops,
        "NVIDIA H200 NVL": 835e12,
        "NVIDIA H200": CARDS["h200"].peak_flops,
    }
)
"""Dense bfloat16 FLOP/s of one device, by a prefix of JAX's `device_kind`. The first match is used,
so longer prefixes come first. Source: the vendors' data sheets."""


def train_step_flops(forward_flops: int, batch: int, *, recompute: bool = False) -> int:
    """Returns the FLOPs of one training step: the backward pass costs two forward passes.

    Args:
      forward_flops: FLOPs of the forward pass of one sample.
      batch: Number of samples per step.
      recompute: Whether to count the forward pass that full rematerialization repeats. MFU is
        defined without it: recomputation is work of the hardware, not of the model.
    """
    return (4 if recompute else 3) * forward_flops * batch


def peak_flops(device_kind: str) -> float | None:
    """Returns the dense bfloat16 FLOP/s of one device, or None if the device is unknown."""
    for prefix, peak in PEAK_FLOPS.items():
        if device_kind.lower().startswith(prefix.lower()):
            return peak
    return None


def mfu(step_flops: float, step_seconds: float, num_devices: int, device_kind: str) -> float | None:
    """Returns model FLOPs utilization: the fraction of the devices' bfloat16 peak, 0 to 1.

    Args:
      step_flops: `train_step_flops` of the global batch, without recomputation.
      step_seconds: Duration of a step in seconds.
      num_devices: Number of devices that run the step.
      device_kind: `jax.Device.device_kind` of the devices.

    Returns:
      The fraction, or None if the device's peak is unknown, as on a CPU.
    """
    peak = peak_flops(device_kind)
    if peak is None or step_seconds <= 0:
        return None
    return step_flops / (step_seconds * num_devices * peak)
