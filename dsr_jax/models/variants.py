"""Sizes by their names in the papers; plain data that configs may import.

Source: spec denoiser 1.13 (S, B and L are the standard widths; only XL was released).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

DIT: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
        "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
        "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
        "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
    }
)

DIT_DH: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        name: {**sizes, "decoder_hidden_size": 2048, "decoder_depth": 2, "decoder_num_heads": 16}
        for name, sizes in DIT.items()
    }
)
"""The same encoders with the wide head. Source: spec denoiser 2.4 (XL was released; S is RAE's
guide)."""

SIT: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        name: {
            **sizes,
            "patch_size": 2,
            "use_swiglu": False,
            "use_rope": False,
            "use_rmsnorm": False,
            "learn_sigma": True,
        }
        for name, sizes in DIT.items()
    }
)
"""The same sizes with SiT's flags. Source: spec denoiser 10.1."""

REGISTER_START: Mapping[str, int] = MappingProxyType({"S": 4, "B": 4, "L": 8, "XL": 8})
"""First block with diffusion registers: XL released; S and B follow from the paper's GFLOPs; L is
JiT-L's, which has the same depth."""

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
