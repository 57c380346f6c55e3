"""Rule tables of the frozen ViT encoders, and their sizes as the hub's config.json states them.

Source: transformers 4.56 modeling_{siglip,dinov2,dinov2_with_registers,dinov3_vit,vit_mae}.py (hub
files keep these names in release 5); spec encoder 13.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.convert.rules import (
    CONV,
    LINEAR,
    Layout,
    Rule,
    RuleSet,
    Stack,
    linear,
    shapes_of,
    vector,
)
from dsr_jax.core.errors import ConversionError
from dsr_jax.models.variants import IMAGENET_STATISTICS
from dsr_jax.models.vit import ViT, ViTConfig

FAMILIES: Mapping[str, str] = MappingProxyType(
    {"siglip2": "siglip", "dinov2": "dinov2", "dinov3": "dinov3", "mae": "mae"}
)
"""Our families by their name on the command line."""

_MODEL_TYPES = {
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
    "dinov3_vit": "dinov3",
    "vit_mae": "mae",
}
"""Our family by the hub's model_type. SigLIP2 of a fixed resolution is a "siglip" there."""

_ANCHORS = {
    "siglip": "embeddings.patch_embedding.weight",
    "dinov2": "embeddings.patch_embeddings.projection.weight",
    "dinov3": "embeddings.patch_embeddings.weight",
    "mae": "embeddings.patch_embeddings.projection.weight",
}
"""A tensor that every file of the family holds once; what comes before its name is the prefix."""

_UNUSED = {
    # The attention-pooling head and the final norm's affine: RAE takes the affine away.
    "siglip": ("post_layernorm.*", "head.*", "embeddings.position_ids"),
    "dinov2": ("embeddings.mask_token", "layernorm.*"),
    "dinov3": ("embeddings.mask_token", "norm.*"),
    "mae": ("layernorm.*",),
}
"""Tensors below the prefix that the encoder has no use for."""

_OUTSIDE = ("text_model.", "logit_scale", "logit_bias", "decoder.")
"""Tensors beside the encoder in hub files (SigLIP's text tower, MAE's own decoder) and in
checkpoints of RAE (its decoder)."""

_COMMON_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
}

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "siglip": {
        **_COMMON_DEFAULTS,
        "intermediate_size": 3072,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "dinov2": {**_COMMON_DEFAULTS, "patch_size": 14, "mlp_ratio": 4},
    "dinov2_with_registers": {**_COMMON_DEFAULTS, "mlp_ratio": 4, "num_register_tokens": 4},
    "dinov3_vit": {
        **_COMMON_DEFAULTS,
        "hidden_size": 384,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
        "layer_norm_eps": 1e-5,
        "num_register_tokens": 0,
        "rope_theta": 100.0,
        "query_bias": True,
        "key_bias": False,
        "value_bias": True,
        "use_gated_mlp": False,
    },
    "vit_mae": {**_COMMON_DEFAULTS, "intermediate_size": 3072, "layer_norm_eps": 1e-12},
}
"""What transformers takes for a value that config.json leaves out, as hub files do."""

_REQUIRED: Mapping[str, Mapping[str, Any]] = {
    "siglip": {"num_channels": 3},
    "dinov2": {"num_channels": 3, "qkv_bias": True, "use_swiglu_ffn": False},
    "dinov3": {
        "num_channels": 3,
        "proj_bias": True,
        "mlp_bias": True,
    },
    "mae": {"num_channels": 3, "qkv_bias": True},
}
"""Options for which only the default is supported."""

_ACTIVATIONS = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
}


def config_from_hub(record: Mapping[str, Any]) -> ViTConfig:
    """Sizes and flags from the content of a hub snapshot's config.json.

    Raises:
      ConversionError: If the model is of another kind, or has an option that is not supported.
    """
    kind = record.get("model_type")
    if kind not in _MODEL_TYPES:
        hint = "; NaFlex checkpoints are not supported" if kind == "siglip2" else ""
        raise ConversionError(
            f"config.json describes a {kind!r}, which is none of the encoders",
            f"supported are {', '.join(_MODEL_TYPES)}{hint}",
        )
    family = _MODEL_TYPES[kind]
    given = record.get("vision_config", {}) if kind == "siglip" else record
    required = _REQUIRED[family]
    if wrong := {
        name: given[name] for name in required if given.get(name, required[name]) != required[name]
    }:
        raise ConversionError(
            f"config.json sets {wrong}, which is not supported", f"needed is {dict(required)}"
        )
    sizes = {**_DEFAULTS.get(kind, _DEFAULTS.get(family, {})), **given}
    if sizes["hidden_act"] not in _ACTIVATIONS:
        raise ConversionError(
            f"config.json sets hidden_act={sizes['hidden_act']!r}, which is not supported",
            f"supported are {', '.join(_ACTIVATIONS)}",
        )
    mlp_dim = sizes.get("intermediate_size")
    if mlp_dim is None or "mlp_ratio" in _DEFAULTS.get(kind, {}):
        mlp_dim = int(sizes["hidden_size"] * sizes["mlp_ratio"])
    registers = sizes.get("num_register_tokens", 0)
    return ViTConfig(
        family=family,
        image_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        hidden_size=sizes["hidden_size"],
        depth=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        mlp_dim=mlp_dim,
        layer_norm_eps=sizes["layer_norm_eps"],
        activation=_ACTIVATIONS[sizes["hidden_act"]],
        num_registers=registers,
        **_architecture(family, kind, sizes),
    )


def _architecture(family: str, kind: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the ViTConfig fields in which the families differ."""
    if family == "siglip":
        return {}
    flags: dict[str, Any] = {"use_cls": True, **IMAGENET_STATISTICS}
    if family in ("dinov2", "dinov3"):
        flags["use_layer_scale"] = True
    if kind == "dinov2_with_registers":
        flags["position_resampling"] = "bicubic-antialias"
    if family == "dinov3":
        rope = sizes.get("rope_parameters") or sizes
        flags |= {
            "position_resampling": "",
            "rope_theta": float(rope["rope_theta"]),
            "query_bias": sizes["query_bias"],
            "key_bias": sizes["key_bias"],
            "value_bias": sizes["value_bias"],
            "gated_mlp": sizes["use_gated_mlp"],
        }
    return flags


def pixel_statistics(record: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Returns the ViTConfig fields given by a snapshot's preprocessor_config.json."""
    names = {"pixel_mean": "image_mean", "pixel_std": "image_std"}
    return {ours: tuple(record[name]) for ours, name in names.items() if record.get(name)}


def take_encoder(state: Mapping[str, np.ndarray], family: str) -> dict[str, np.ndarray]:
    """Takes the encoder out of a hub file or a checkpoint of RAE, under names without prefix.

    Raises:
      ConversionError: If there is none, several, or something unknown beside it.
    """
    anchor = _ANCHORS[family]
    # MAE's anchor and DINOv2's are the same; MAE's decoder has no patch embedding.
    prefixes = [key.removesuffix(anchor) for key in state if key.endswith(anchor)]
    if len(prefixes) != 1:
        raise ConversionError(
            f"{len(prefixes)} tensors are named ...{anchor}, which a {family} encoder has once; "
            f"the file begins with {', '.join(list(state)[:4])}",
            "name the family that the file belongs to",
        )
    (prefix,) = prefixes
    beside = [key for key in state if not key.startswith(prefix)]
    if unknown := [key for key in beside if not any(name in f".{key}" for name in _BESIDE)]:
        raise ConversionError(
            f"unknown tensors besides the encoder {prefix}*: {', '.join(unknown[:8])}",
            "check that the file is an encoder's, or a checkpoint of RAE",
        )
    return {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}


_BESIDE = tuple(f".{name}" for name in _OUTSIDE)


class Table(NamedTuple):
    """Rules outside the blocks, rules inside, the blocks' name, the names of q, k, v and out."""

    top: list[Rule]
    block: list[Rule]
    layers: str
    attention: tuple[str, ...]


def encoder_rules(config: ViTConfig) -> RuleSet:
    """Returns the rules of an encoder, for names below its prefix."""
    table = _TABLES[config.family](config)
    unused = _UNUSED[config.family]
    norm = norm_rules("layernorm", "norm") if config.class_output else []
    if norm:
        unused = tuple(name for name in unused if name != "layernorm.*")
    return RuleSet(
        (*table.top, *norm, *stacked_rules(config, table)), shapes_of(_abstract(config)), unused
    )


def stacked_rules(config: ViTConfig, table: Table) -> list[Rule]:
    """Returns the rules of the stack `blocks`, including attention, which all networks share."""
    heads, head_dim = config.num_heads, config.hidden_size // config.num_heads
    into, bias = linear(outputs=(heads, head_dim)), vector(heads, head_dim)
    block = list(table.block)
    flags = {"q": config.query_bias, "k": config.key_bias, "v": config.value_bias}
    biased = [name for name, flag in flags.items() if flag]
    for name, source in zip("qkv", table.attention, strict=False):
        block.append(Rule(f"{source}.weight", f"attn/{name}/kernel", into))
        if name in biased:
            block.append(Rule(f"{source}.bias", f"attn/{name}/bias", bias))
    block += layer_rules(table.attention[3], "attn/out", linear(inputs=(heads, head_dim)))
    stack = (Stack("blocks", 0, config.depth),)
    return [Rule(f"{table.layers}.{{i}}.{r.source}", r.target, r.layout, stack) for r in block]


def _abstract(config: ViTConfig) -> Any:
    side = config.patch_size
    init = ViT(config).init
    return nn.unbox(jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, side, side, 3))))[
        "params"
    ]


def _siglip(config: ViTConfig) -> Table:
    rows = (config.image_size // config.patch_size) ** 2
    top = [
        *layer_rules("embeddings.patch_embedding", "patch_embed", CONV),
        Rule("embeddings.position_embedding.weight", "pos_embed", vector(1, rows)),
    ]
    block = [
        *norm_rules("layer_norm1", "norm1"),
        *norm_rules("layer_norm2", "norm2"),
        *layer_rules("mlp.fc1", "mlp/fc1"),
        *layer_rules("mlp.fc2", "mlp/fc2"),
    ]
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    return Table(top, block, "encoder.layers", tuple(f"self_attn.{n}" for n in names))


def _dinov2(config: ViTConfig) -> Table:
    top = [
        *layer_rules("embeddings.patch_embeddings.projection", "patch_embed", CONV),
        Rule("embeddings.cls_token", "cls_token"),
        Rule("embeddings.position_embeddings", "pos_embed"),
    ]
    if config.num_registers:
        top.append(Rule("embeddings.register_tokens", "register_tokens"))
    block = [
        *norm_rules("norm1", "norm1"),
        *norm_rules("norm2", "norm2"),
        *layer_rules("mlp.fc1", "mlp/fc1"),
        *layer_rules("mlp.fc2", "mlp/fc2"),
        Rule("layer_scale1.lambda1", "ls1"),
        Rule("layer_scale2.lambda1", "ls2"),
    ]
    return Table(top, block, "encoder.layer", _BERT)


def _dinov3(config: ViTConfig) -> Table:
    top = [
        *layer_rules("embeddings.patch_embeddings", "patch_embed", CONV),
        Rule("embeddings.cls_token", "cls_token"),
    ]
    if config.num_registers:
        top.append(Rule("embeddings.register_tokens", "register_tokens"))
    block = [
        *norm_rules("norm1", "norm1"),
        *norm_rules("norm2", "norm2"),
        *layer_rules("mlp.up_proj", "mlp/fc1"),
        *layer_rules("mlp.down_proj", "mlp/fc2"),
        Rule("layer_scale1.lambda1", "ls1"),
        Rule("layer_scale2.lambda1", "ls2"),
    ]
    if config.gated_mlp:
        block += layer_rules("mlp.gate_proj", "mlp/gate")
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return Table(top, block, "layer", tuple(f"attention.{n}" for n in names))


def _mae(config: ViTConfig) -> Table:
    del config
    top = [
        *layer_rules("embeddings.patch_embeddings.projection", "patch_embed", CONV),
        Rule("embeddings.cls_token", "cls_token"),
        Rule("embeddings.position_embeddings", "pos_embed"),
    ]
    return mae_table(top, "encoder.layer")


def mae_table(top: list[Rule], layers: str) -> Table:
    """Rules of MAE's blocks, which RAE's decoder has, too, below the name `layers`."""
    block = [
        *norm_rules("layernorm_before", "norm1"),
        *norm_rules("layernorm_after", "norm2"),
        *layer_rules("intermediate.dense", "mlp/fc1"),
        *layer_rules("output.dense", "mlp/fc2"),
    ]
    return Table(top, block, layers, _BERT)


_BERT = (
    "attention.attention.query",
    "attention.attention.key",
    "attention.attention.value",
    "attention.output.dense",
)


_TABLES = {"siglip": _siglip, "dinov2": _dinov2, "dinov3": _dinov3, "mae": _mae}


def layer_rules(source: str, target: str, weight: Layout = LINEAR) -> list[Rule]:
    """Returns the rules for weight and bias of a linear layer or convolution."""
    return [
        Rule(f"{source}.weight", f"{target}/kernel", weight),
        Rule(f"{source}.bias", f"{target}/bias"),
    ]


def norm_rules(source: str, target: str) -> list[Rule]:
    """Returns the rules for scale and bias of a norm."""
    return [Rule(f"{source}.weight", f"{target}/scale"), Rule(f"{source}.bias", f"{target}/bias")]
