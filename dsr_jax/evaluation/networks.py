"""Frozen networks whose features are scored, with the settings that determine the features."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.core.errors import EvaluationError
from dsr_jax.core.typing import Array, Params
from dsr_jax.models.inception import InceptionV3
from dsr_jax.models.inception_input import prepare
from dsr_jax.models.resample import resample
from dsr_jax.models.vit import ViT, ViTConfig

_UNKNOWN: Mapping[str, Any] = MappingProxyType({"params_digest": "unknown"})
_DINOV2_SIZE = 224
_DINOV2_INPUT = f"{_DINOV2_SIZE} pixels, bicubic with antialiasing in float32"


@dataclass(frozen=True)
class FeatureNetwork:
    """A network from images to features.

    Attributes:
      outputs: Names of its features.
      params: Parameters of the network.
      apply: `(params, uint8 images [B, H, W, C]) -> features [B, D] by name`.
      recipe: Settings that must be equal for features to be comparable.
      record: Record of its conversion.
    """

    outputs: frozenset[str]
    params: Params
    apply: Callable[[Params, Array], Mapping[str, Array]]
    recipe: Mapping[str, Any]
    record: Mapping[str, Any] = field(default_factory=dict)


def unpublished(record: Mapping[str, Any]) -> str:
    """Returns why scores by these weights may not compare with papers; "" if they are published.

    Args:
      record: Of their conversion, which compares the source with the digest of the published file
        where one is known.
    """
    if record.get("published"):
        return ""
    return (
        f"the weights of {record.get('family', 'the network')} (from "
        f"{record.get('source', 'an unknown source')}, {record['params_digest'][:19]}) are not "
        "verified as the published ones; compare scores only with those of the same params_digest"
    )


def inception_features(
    network: InceptionV3,
    params: Params,
    record: Mapping[str, Any] = _UNKNOWN,
    resize: str = "adm",
) -> FeatureNetwork:
    """Returns Inception's features "pool", "spatial" and "logits" (`models.inception.Features`).

    Args:
      network: The network.
      params: Parameters of the network.
      record: Record of the conversion, with the digest of the parameters.
      resize: A name in `models.inception_input.RESIZES`.
    """

    def apply(params: Params, images: Array) -> Mapping[str, Array]:
        features: Any = network.apply({"params": params}, prepare(images, resize))
        return features._asdict()

    outputs = frozenset(("pool", "spatial", "logits"))
    recipe = {"weights": record["params_digest"], "resize": resize}
    return FeatureNetwork(outputs, params, apply, recipe, record)


def dinov2_features(
    config: ViTConfig, params: Params, record: Mapping[str, Any] = _UNKNOWN
) -> FeatureNetwork:
    """Returns DINOv2's feature "class_token" after the final norm, as in dgm-eval and EDM2.

    Images become 224 pixels wide by PyTorch's bicubic interpolation with antialiasing, in float32
    and without rounding or clipping, as in EDM2; dgm-eval rounds to uint8 there. They are then
    normalized by ImageNet's mean and standard deviation. The position table is resampled as
    torch.hub's DINOv2 does. Source: spec evaluation 6.5.

    Args:
      config: Sizes of the encoder.
      params: Parameters of the network.
      record: Record of the conversion, with the digest of the parameters.

    Raises:
      EvaluationError: If it has no class output or is another encoder.
    """
    if not config.class_output:
        raise EvaluationError(
            "this encoder was converted without its class output",
            "convert DINOv2 again: python -m dsr_jax.convert dinov2 --class-output",
        )
    if config.num_registers or config.position_resampling != "bicubic":
        raise EvaluationError(
            "this is not DINOv2 without registers", "convert facebook/dinov2-large, for example"
        )
    if _DINOV2_SIZE % config.patch_size:
        raise EvaluationError(
            f"an encoder of patches of {config.patch_size} takes no images of {_DINOV2_SIZE} pixels"
        )
    # Transformers resamples the table to the size itself, the original by a factor.
    encoder = ViT(replace(config, position_resampling="bicubic-offset"))
    mean, std = (np.array(x, np.float32) for x in (config.pixel_mean, config.pixel_std))

    def apply(params: Params, images: Array) -> Mapping[str, Array]:
        if images.shape[-1] == 1:
            images = jnp.repeat(images, 3, axis=-1)
        pixels = images.astype(jnp.float32) / 255
        pixels = resample(pixels, _DINOV2_SIZE, _DINOV2_SIZE, "bicubic-antialias")
        with jax.default_matmul_precision("highest"):
            out: Any = encoder.apply({"params": params}, (pixels - mean) / std)
        return {"class_token": out.class_token}

    recipe = {"dinov2": {"weights": record["params_digest"], "input": _DINOV2_INPUT}}
    return FeatureNetwork(frozenset(("class_token",)), params, apply, recipe, record)
