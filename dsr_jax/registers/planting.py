"""Plants register neurons in an encoder that has none, so that claims about them can be tested.

Pretrained encoders grow outlier tokens by themselves: hidden MLP units that fire on a few patches
write a large common vector, and later blocks keep and enlarge it. The same mechanism is built here
by hand into a randomly initialised encoder: *trigger* units recognise a few patches by their
content, *amplifier* units in later blocks recognise the vector that was written. Nothing else
changes, so all other patches keep their content.

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

# Added to a probed unit so that GELU is the identity there.
_LINEAR = 64.0
# Where between other tokens and outliers a detector turns positive: far enough from the others
# that GELU, which is slightly negative before its zero, leaves them alone.
_MARGIN = 0.4
# Outliers are to be seen in several images, not all in one that is unlike the others.
_LEAST_IMAGES = 3


@dataclass(frozen=True)
class Planted:
    """An encoder with register neurons.

    Attributes:
      params: Parameters, NumPy arrays.
      neurons: Units by block.
      outliers: Patches of the calibration images that fire [B, T], bool.
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
    share: tuple[float, float] = (0.02, 0.08),
    norm: float = 8.0,
    activation: float = 12.0,
    seed: int = 0,
) -> Planted:
    """Overwrites hidden MLP units with register neurons.

    Args:
      model: The encoder.
      params: Its parameters; not changed.
      pixels: Normalised images [B, H, W, 3] on which the units are calibrated.
      neurons: Units to plant, by block. The units of the first block are triggers, the others
        amplifiers.
      share: Least and greatest share of the patches that become outliers.
      norm: Norm that outliers reach, in multiples of the median norm.
      activation: How strongly a planted unit fires on an outlier.
      seed: Fixes the direction of the vector that is written.

    Returns:
      The new parameters, and which patches of `pixels` fire.

    Raises:
      ConfigError: If the encoder has a gated MLP, or no patch of `pixels` differs enough from the
        rest to be recognised.
    """
    if model.config.gated_mlp:
        raise ConfigError("register neurons cannot be planted in a gated MLP")
    planter = _Planter(model, params, pixels)
    direction = np.random.default_rng(seed).standard_normal(model.config.hidden_size)
    direction -= direction.mean()  # LayerNorm would take the mean away.
    direction /= np.linalg.norm(direction)

    first, *later = sorted(neurons)
    height = norm * planter.median_norm()
    inputs = planter.mlp_inputs(first)
    fires, outliers = _find_trigger(inputs, planter.patches, share)
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
    """Parameters under change, and what the encoder computes with them."""

    def __init__(self, model: ViT, params: Params, pixels: Array) -> None:
        self._trace = jax.jit(functools.partial(trace_encoder, model))
        self._pixels = pixels
        self.params = jax.tree.map(np.array, params)
        self.patches = slice(model.config.num_prefix, None)

    def median_norm(self) -> float:
        """Median norm of the patches after the last block."""
        outputs = self._trace(self.params, self._pixels).outputs[-1]
        return float(np.median(np.linalg.norm(outputs[:, self.patches], axis=-1)))

    def mlp_inputs(self, block: int) -> np.ndarray:
        """What the MLP of a block reads [B, S, D]: measured by units that copy it."""
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
        """Makes `units` fire with `activation` on outliers, where together they add `written`."""
        mlp = self.params["blocks"]["mlp"]
        share = written / (activation * len(units))
        if "ls2" in self.params["blocks"]:
            share = share / self.params["blocks"]["ls2"][block]
        for unit in units:
            mlp["fc1"]["kernel"][block, :, unit] = activation * detector.weight
            mlp["fc1"]["bias"][block, unit] = activation * detector.bias
            mlp["fc2"]["kernel"][block, unit] = share


def _find_trigger(
    inputs: np.ndarray, patches: slice, share: tuple[float, float]
) -> tuple[_Detector, np.ndarray]:
    """Finds a few patches that stand out most clearly by their likeness to one of them.

    Args:
      inputs: What the MLP reads [B, S, D].
      patches: The rows that may stand out.
      share: Least and greatest share of the patches.

    Returns:
      Their detector, and the mark of every row [B, S].
    """
    tokens = inputs[:, patches].reshape(-1, inputs.shape[-1])
    centre = tokens.mean(axis=0)
    least, most = (max(1, round(part * len(tokens))) for part in share)
    # The intervention spares the first row, so an outlier there would not be cured.
    forbidden = np.delete(inputs, np.arange(inputs.shape[1])[patches][1:], axis=1) - centre
    images = np.repeat(np.arange(len(inputs)), len(tokens) // len(inputs))
    best, edges, direction = 0.0, (0.0, 0.0), centre
    for prototype in tokens - centre:
        candidate = prototype / np.linalg.norm(prototype)
        likeness = (tokens - centre) @ candidate
        order = np.argsort(-likeness)
        if len(np.unique(images[order[:least]])) < min(_LEAST_IMAGES, len(inputs)):
            continue
        ordered = likeness[order]
        gaps = (ordered[least - 1 : most] - ordered[least : most + 1]) / likeness.std()
        place = int(np.argmax(gaps))
        high, low = ordered[least + place - 1 : least + place + 1]
        if gaps[place] > best and (forbidden @ candidate < high).all():
            best, edges, direction = float(gaps[place]), (float(low), float(high)), candidate
    if not best:
        raise ConfigError("no patch stands out from the others", "calibrate on more varied images")
    values = (inputs - centre) @ direction
    outliers = values >= edges[1]
    zero = edges[0] + _MARGIN * (edges[1] - edges[0])
    offset = float(centre @ direction)
    return _detector(direction, zero + offset, values[outliers].mean() + offset), outliers


def _separate(inputs: np.ndarray, direction: np.ndarray, outliers: np.ndarray) -> _Detector:
    """A detector of known outliers by their component along the written vector."""
    values = inputs @ direction
    low, high = values[~outliers].max(), values[outliers].min()
    if low >= high:
        raise ConfigError(
            "the written vector does not reach the next planted block", "plant with a larger norm"
        )
    return _detector(direction, low + _MARGIN * (high - low), values[outliers].mean())


def _detector(direction: np.ndarray, zero: float, one: float) -> _Detector:
    """The affine function along `direction` that is 0 at `zero` and 1 at `one`."""
    return _Detector(direction / (one - zero), -zero / (one - zero))
