"""Recognizes the network of a file's weights, so that errors can name the right family."""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from dsr_jax.core.errors import ConversionError

_SIGNS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = MappingProxyType(
    {
        "ditdh": (("s_embedder.proj.weight",), ("latent_queries",)),
        "jit": (("x_embedder.proj1.weight",), ()),
        "lightningdit": (
            ("x_embedder.proj.weight", "t_embedder.W", "final_layer.linear.weight"),
            ("s_embedder.proj.weight",),
        ),
        "sit": (
            ("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "final_layer.linear.weight"),
            ("t_embedder.W", "latent_queries"),
        ),
        "scale_rae": (("latent_queries", "diff_head.model.x_embedder.proj.weight"), ()),
        "qwen2": (("embed_tokens.weight", "self_attn.q_proj.bias"), ("latent_queries",)),
        "decoder": (("trainable_cls_token",), ()),
        "sdvae": (("encoder.conv_in.weight", "decoder.conv_out.weight"), ()),
        "siglip2": (("embeddings.patch_embedding.weight",), ()),
        "dinov3": (("embeddings.patch_embeddings.weight",), ()),
        "dinov2": (
            ("embeddings.patch_embeddings.projection.weight", "layer_scale1.lambda1"),
            (),
        ),
        "mae": (
            ("embeddings.patch_embeddings.projection.weight", "layernorm_before.weight"),
            (),
        ),
        "lpips": (("lin0.model.1.weight",), ()),
        "inception": (("Mixed_5b.branch1x1.conv.weight",), ()),
        "dino_discriminator": (
            ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "cls_token"),
            ("mask_token", "blocks.0.ls1.gamma"),
        ),
    }
)
"""For each family, by its command's name: ends of names that it has, and that it has not."""

TITLES: Mapping[str, str] = MappingProxyType(
    {
        "ditdh": "DiTDH (DiTwDDTHead)",
        "jit": "JiT",
        "lightningdit": "LightningDiT",
        "sit": "SiT",
        "scale_rae": "Scale-RAE's text-to-image model",
        "qwen2": "Qwen2",
        "decoder": "RAE's decoder",
        "sdvae": "an AutoencoderKL",
        "siglip2": "SigLIP2",
        "dinov3": "DINOv3",
        "dinov2": "DINOv2",
        "mae": "MAE",
        "lpips": "LPIPS",
        "inception": "FID's Inception",
        "dino_discriminator": "DINO",
    }
)
"""What the networks are called, by the command's name."""


def recognize(names: Iterable[str]) -> list[str]:
    """Returns the families whose weights are among these names; several for a whole RAE."""
    lines = "\n".join(names)

    def has(end: str) -> bool:
        return re.search(rf"(?:^|\.){re.escape(end)}$", lines, re.MULTILINE) is not None

    return [
        family
        for family, (needed, absent) in _SIGNS.items()
        if all(map(has, needed)) and not any(map(has, absent))
    ]


def check_family(names: Iterable[str], family: str, source: str) -> None:
    """Checks that a file is not of another family than the one that was asked for.

    Args:
      names: Names of its tensors.
      family: The command's name.
      source: The file, for the error.

    Raises:
      ConversionError: If it is recognized as another; files that are not recognized pass.
    """
    found = recognize(names)
    if found and family not in found:
        asked = TITLES.get(family, family)
        raise ConversionError(
            f"{source}: this is {' with '.join(TITLES[name] for name in found)}, not {asked}",
            f"use python -m dsr_jax.convert {' or '.join(found)}",
        )
