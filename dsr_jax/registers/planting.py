"""Plants register neurons in an encoder that has none, so that claims about them can be tested.

In pretrained encoders, hidden MLP units that are active on a few patches add a large common vector
to them, which later blocks keep and amplify. Here the same mechanism is set by hand in a randomly
initialized encoder: *trigger* units detect a few patches by their content, and *amplifier* units in
later blocks detect the added vector. All other patches are unchanged.

Source: Jiang et al. 2025, "Vision Transformers Don't Need Trained Registers" (the mechanism).
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from dsr_jax.core.errors import ConfigError
from dsr_jax.core.typing import Array, Params
from dsr_jax.models.vit import ViT
from dsr_jax.registers.trace import trace_encoder

# Bias of probe units, where GELU is the identity.
_LINEAR = 64.0
# Zero of a detector, as a fraction of the way from other tokens to outliers: far enough that GELU,
# which is slightly negative below zero, hardly changes the others.
_MARGIN = 0.4
# Outliers must occur in several images, not in a single unusual one.
_MIN_IMAGES = 3


@dataclass(frozen=True)
class Planted:
    """An encoder with register neurons.

    Attributes:
      params: Parameters, NumPy arrays.
      neurons: Units by block.
      outliers: Patches of the calibration images that become outliers [B, T], bool.
    """

    params: Params
    neurons: dict[int, list[int]]
    outliers: np.ndarray


def plant_register_neurons(
    model: ViT,
    params: Params,
    pixels: Array,
    neurons: Mapping[int, Sequence[int]],
    *,
    fraction: tuple[float, float] = (0.02, 0.08),
    norm: float = 8.0,
    activation: float = 12.0,
    seed: int = 0,
) -> Planted:
    """Overwrites hidden MLP units with register neurons.

    Args:
      model: The encoder.
      params: Its parameters, which are not changed.
      pixels: Normalized images [B, H, W, 3] on which the units are calibrated.
      neurons: Units to plant, by block. The units of the first block are triggers, the others
        amplifiers.
      fraction: Minimum and maximum fraction of the patches that become outliers.
      norm: Norm of outliers, in multiples of the median norm.
      activation: Activation of a planted unit on an outlier.
      seed: Seed of the direction of the added vector.

    Returns:
      The new parameters, and which patches of `pixels` become outliers.

    Raises:
      ConfigError: If the encoder has a gated MLP, or no patch of `pixels` differs enough from the
        rest to be detected.
    """
    if model.config.gated_mlp:
        raise ConfigError("register neurons cannot be planted in a gated MLP")
    planter = _Planter(model, params, pixels)
    direction = np.random.default_rng(seed).standard_normal(model.config.hidden_size)
    direction -= direction.mean()  # LayerNorm would remove the mean.
    direction /= np.linalg.norm(direction)

    first, *later = sorted(neurons)
    height = norm * planter.median_norm()
    inputs = planter.mlp_inputs(first)
    fires, outliers = _find_trigger(inputs, planter.patches, fraction)
    steps = 1 + len(later)
    planter.plant(first, neurons[first], fires, activation, direction * height / steps)
    for block in later:
        inputs = planter.mlp_inputs(block)
        fires = _separate(inputs, direction, outliers)
        planter.plant(block, neurons[block], fires, activation, direction * height / steps)
    planted = {block: sorted(int(unit) for unit in neurons[block]) for block in sorted(neurons)}
    return Planted(planter.params, planted, outliers[:, planter.patches])


@dataclass(frozen=True)
class _Detector:
    """`weight @ x + bias` is 1 on the mean outlier and below 0 on all other tokens."""

    weight: np.ndarray
    bias: float


class _Planter:
    """The parameters being changed, and the encoder's activations with them."""

    def __init__(self, model: ViT, params: Params, pixels: Array) -> None:
        self._trace = jax.jit(functools.partial(trace_encoder, model))
        self._pixels = pixels
        self.params = jax.tree.map(np.array, params)
        self.patches = slice(model.config.num_prefix, None)

    def median_norm(self) -> float:
        """Returns the median norm of the patches after the last block."""
        outputs = self._trace(self.params, self._pixels).outputs[-1]
        return float(np.median(np.linalg.norm(outputs[:, self.patches], axis=-1)))

    def mlp_inputs(self, block: int) -> np.ndarray:
        """Returns the input of a block's MLP [B, S, D], measured by units that copy it."""
        probe = jax.tree.map(np.array, self.params)
        layer = probe["blocks"]["mlp"]["fc1"]
        width = layer["kernel"].shape[1]
        layer["kernel"][block, :, :width] = np.eye(width)
        layer["bias"][block, :width] = _LINEAR
        trace = self._trace(probe, self._pixels)
        return np.asarray(trace.activations[block][..., :width], np.float64) - _LINEAR

    def plant(
        self,
        block: int,
        units: Sequence[int],
        detector: _Detector,
        activation: float,
        written: np.ndarray,
    ) -> None:
        """Sets `units` to `activation` on outliers, to which together they add `written`."""
        mlp = self.params["blocks"]["mlp"]
        output = written / (activation * len(units))
        if "ls2" in self.params["blocks"]:
            output = output / self.params["blocks"]["ls2"][block]
        for unit in units:
            mlp["fc1"]["kernel"][block, :, unit] = activation * detector.weight
            mlp["fc1"]["bias"][block, unit] = activation * detector.bias
            mlp["fc2"]["kernel"][block, unit] = output


def _find_trigger(
    inputs: np.ndarray, patches: slice, fraction: tuple[float, float]
) -> tuple[_Detector, np.ndarray]:
    """Finds a few similar patches that differ most clearly from all others.

    Args:
      inputs: Input of the MLP [B, S, D].
      patches: Rows of the patches.
      fraction: Minimum and maximum fraction of the patches.

    Returns:
      Their detector, and the mark of every row [B, S].
    """
    tokens = inputs[:, patches].reshape(-1, inputs.shape[-1])
    center = tokens.mean(axis=0)
    low_count, high_count = (max(1, round(part * len(tokens))) for part in fraction)
    # The intervention skips the first row, so an outlier there would remain.
    forbidden = np.delete(inputs, np.arange(inputs.shape[1])[patches][1:], axis=1) - center
    images = np.repeat(np.arange(len(inputs)), len(tokens) // len(inputs))
    best, edges, direction = 0.0, (0.0, 0.0), center
    for prototype in tokens - center:
        candidate = prototype / np.linalg.norm(prototype)
        similarity = (tokens - center) @ candidate
        order = np.argsort(-similarity)
        if len(np.unique(images[order[:low_count]])) < min(_MIN_IMAGES, len(inputs)):
            continue
        ordered = similarity[order]
        gaps = (
            ordered[low_count - 1 : high_count] - ordered[low_count : high_count + 1]
        ) / similarity.std()
        index = int(np.argmax(gaps))
        high, low = ordered[low_count + index - 1 : low_count + index + 1]
        if gaps[index] > best and (forbidden @ candidate < high).all():
            best, edges, direction = float(gaps[index]), (float(low), float(high)), candidate
    if not best:
        raise ConfigError(
            "no group of patches differs enough from the others", "calibrate on more varied images"
        )
    values = (inputs - center) @ direction
    outliers = values >= edges[1]
    zero = edges[0] + _MARGIN * (edges[1] - edges[0])
    offset = float(center @ direction)
    return _detector(direction, zero + offset, values[outliers].mean() + offset), outliers


def _separate(inputs: np.ndarray, direction: np.ndarray, outliers: np.ndarray) -> _Detector:
    """Returns a detector of known outliers by their component along the added vector."""
    values = inputs @ direction
    low, high = values[~outliers].max(), values[outliers].min()
    if low >= high:
        raise ConfigError(
            "the added vector is lost before the next planted block", "plant with a larger norm"
        )
    return _detector(direction, low + _MARGIN * (high - low), values[outliers].mean())


def _detector(direction: np.ndarray, zero: float, one: float) -> _Detector:
    """Returns the affine function along `direction` that is 0 at `zero` and 1 at `one`."""
    return _Detector(direction / (one - zero), -zero / (one - zero))
