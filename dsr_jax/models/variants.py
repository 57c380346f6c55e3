"""Sizes of the frozen networks by name; plain data that configs may import.

The sizes of the denoisers are defined next to their networks.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

IMAGENET_STATISTICS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {"pixel_mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225)}
)

_BASE = {"hidden_size": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072}

_DINOV2 = {
    **_BASE,
    **IMAGENET_STATISTICS,
    "family": "dinov2",
    "image_size": 518,
    "patch_size": 14,
    "use_cls": True,
    "use_layer_scale": True,
}

ENCODERS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "siglip2-base-patch16-256": {
            **_BASE,
            "family": "siglip",
            "image_size": 256,
            "patch_size": 16,
            "activation": "gelu_tanh",
        },
        "siglip2-so400m-patch14-224": {
            "family": "siglip",
            "image_size": 224,
            "patch_size": 14,
            "hidden_size": 1152,
            "depth": 27,
            "num_heads": 16,
            "mlp_dim": 4304,
            "activation": "gelu_tanh",
        },
        "dinov2-base": _DINOV2,
        "dinov2-with-registers-base": {
            **_DINOV2,
            "num_registers": 4,
            "position_resampling": "bicubic-antialias",
        },
        "dinov3-vitb16": {
            **_BASE,
            **IMAGENET_STATISTICS,
            "family": "dinov3",
            "image_size": 256,
            "patch_size": 16,
            "layer_norm_eps": 1e-5,
            "use_cls": True,
            "num_registers": 4,
            "use_layer_scale": True,
            "key_bias": False,
            "position_resampling": "",
            "rope_theta": 100.0,
        },
        "mae-base": {
            **_BASE,
            **IMAGENET_STATISTICS,
            "family": "mae",
            "image_size": 224,
            "patch_size": 16,
            "layer_norm_eps": 1e-12,
            "use_cls": True,
        },
    }
)
"""Fields of `models.vit.ViTConfig` by name.  Source: spec encoder 1."""

DECODERS: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "ViTB": {"hidden_size": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072},
        "ViTL": {"hidden_size": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096},
        "ViTXL": {"hidden_size": 1152, "depth": 28, "num_heads": 16, "mlp_dim": 4096},
    }
)
"""Fields of `models.decoder.DecoderConfig` by the official names.  Source: spec encoder 7."""

VGG16_CHANNELS = (64, 128, 256, 512, 512)
"""Widths of VGG16's slices: `models.lpips.LPIPS.channels`."""

_DINO = {
    "family": "dino",
    "image_size": 224,
    "depth": 12,
    "activation": "gelu_tanh",
    "use_cls": True,
    "position_resampling": "bilinear",
    **IMAGENET_STATISTICS,
}
_DINO_S = {**_DINO, "hidden_size": 384, "num_heads": 6, "mlp_dim": 1536}

DINO: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "S_8": {**_DINO_S, "patch_size": 8},
        "S_16": {**_DINO_S, "patch_size": 16},
        "B_16": {**_DINO, "hidden_size": 768, "num_heads": 12, "mlp_dim": 3072, "patch_size": 16},
    }
)
"""Backbones of the discriminator by the official names: fields of `models.vit.ViTConfig`. The
original DINO has the exact GELU; the discriminator runs it with the approximate one.  Source: spec
encoder 9."""

RANDOM_PREFIX = "random:"
"""Where a config names a frozen network, this and a name below stand for random weights: for smoke
runs and tests of sizes."""

_TINY = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "depth": 3, "num_heads": 2}

RANDOM_ENCODERS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        **ENCODERS,
        "tiny": {**_TINY, "family": "siglip", "mlp_dim": 64, "activation": "gelu_tanh"},
    }
)
RANDOM_DECODERS: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {**DECODERS, "tiny": {"hidden_size": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64}}
)
RANDOM_BACKBONES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {**DINO, "tiny": {**_DINO, **_TINY, "mlp_dim": 64}}
)
RANDOM_LPIPS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {"vgg16": VGG16_CHANNELS, "tiny": (4, 4, 4, 4, 4)}
)
