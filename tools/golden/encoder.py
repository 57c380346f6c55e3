"""Golden cases of the frozen encoders, with and without test-time registers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsr_jax.convert.encoders import config_from_hub, encoder_rules, take_encoder
from dsr_jax.convert.rules import torch_to_flax
from dsr_jax.core.typing import Array, Params
from dsr_jax.models.intervention import Intervention
from dsr_jax.models.rope import centered_rope_tables
from dsr_jax.models.vit import EncoderOutput, ViT, ViTConfig, resample_positions
from dsr_jax.registers.neurons import neurons_to_mask
from tools.golden.compare import Case, Check, checks_of
from tools.golden.denoiser import nhwc

MODEL_TYPES = {
    "SigLIP2wNorm": "siglip",
    "SigLIP2wNormTTREG": "siglip",
    "Dinov2withNorm": "dinov2_with_registers",
    "Dinov2withNormNoReg": "dinov2",
    "Dinov3withNorm": "dinov3_vit",
    "MAEwNorm": "vit_mae",
}
"""Architecture names of the hub, by class of the original wrapper."""


def hub_record(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a case's sizes in the format of a hub snapshot's config.json."""
    if "vision_config" in config:
        return {"model_type": "siglip", "vision_config": config["vision_config"]}
    return {**config["hf_config"], "model_type": MODEL_TYPES[config["encoder_cls"]]}


def load_encoder(case: Case) -> tuple[ViTConfig, Params]:
    """Returns a case's encoder: config and parameters."""
    config = config_from_hub(hub_record(case.config))
    state = take_encoder(case.weights(), config.family)
    return config, torch_to_flax(state, encoder_rules(config))


def run_encoder(
    config: ViTConfig, params: Params, pixels: Any, intervention: Intervention | None = None
) -> tuple[EncoderOutput, dict[str, Any]]:
    """Returns outputs and intermediates for pixels [B, C, H, W]."""
    out, kept = ViT(config).apply(
        {"params": params}, jnp.asarray(nhwc(pixels)), intervention, mutable=["intermediates"]
    )
    kept = kept["intermediates"]
    found = {"embeddings": kept["embeddings"][0], "layers": kept["blocks"]["block_out"][0]}
    for name in ("mlp_act", "mlp_act_before"):
        if name in kept["blocks"]["mlp"]:
            found[name] = kept["blocks"]["mlp"][name][0]
    return out, found


def _common(
    pattern: str,
    out: EncoderOutput,
    found: Mapping[str, Any],
    io: Mapping[str, np.ndarray],
    *,
    only_other: bool = False,
) -> list[Check]:
    """What most cases hold of a forward pass, under names of the form `pattern`.

    Its features are always there, but for variants of which a case may hold another output only.
    """
    layers = found["layers"]
    arrays = {
        "features": out.tokens,
        "pre_ln": out.pre_norm,
        "layer_outputs": layers,
        "layer_outputs_sample0": layers[:, :1],
        "layer_token_norms": jnp.linalg.norm(layers, axis=-1),
        "embeddings": found["embeddings"],
        "embeddings_sample0": found["embeddings"][:1],
    }
    named = {pattern.format(name): array for name, array in arrays.items()}
    optional = [key for key in named if key != pattern.format("features")]
    if only_other:
        optional.append(pattern.format("features"))
    return checks_of(named, io, "encoder", optional=optional, axes=dict.fromkeys(named, -1))


def run_plain(case: Case) -> list[Check]:
    """Compares blocks, tokens, resampled positions, a middle layer and another resolution."""
    config, params = load_encoder(case)
    io = case.io
    out, found = run_encoder(config, params, io["pixel_values"])
    checks = _common("{}", out, found, io)
    other = "pixel_values_other_size"
    if other in io:
        checks += _common("{}_other_size", *run_encoder(config, params, io[other]), io)
    side = io["pixel_values"].shape[-1] // config.patch_size
    tables = {"pos_embed_resampled": side}
    if other in io:
        tables["pos_embed_other_size"] = io[other].shape[-1] // config.patch_size
    for key, wanted in tables.items():
        if key in io:
            table = resample_positions(config, jnp.asarray(params["pos_embed"]), wanted, wanted)
            checks.append(Check(key, table, io[key], "encoder"))
    if "rope_cos" in io:
        head_dim = config.hidden_size // config.num_heads
        cos, sin = centered_rope_tables(head_dim, side, side, config.rope_theta)
        checks += [Check("rope_cos", cos, io["rope_cos"], "encoder")]
        checks += [Check("rope_sin", sin, io["rope_sin"], "encoder")]
    if "features_normalize_false" in io:
        weights = case.weights()
        affine = out.tokens * weights["layernorm.weight"] + weights["layernorm.bias"]
        checks.append(
            Check("features_normalize_false", affine, io["features_normalize_false"], "encoder")
        )
    if "features_layer_index" in io:
        # Index 0 is the embeddings, k the output of block k - 1; no norm.
        index = case.config["layer_index"]
        states = jnp.concatenate([found["embeddings"][None], found["layers"]])
        middle = states[index][:, config.num_prefix :]
        checks.append(Check("features_layer_index", middle, io["features_layer_index"], "encoder"))
    return checks


def _mask(config: ViTConfig, neurons: Mapping[str, Any]) -> Array:
    table = {int(block): list(units) for block, units in neurons.items()}
    return neurons_to_mask(table, config.depth, config.mlp_dim)


def run_registers(case: Case) -> list[Check]:
    """Compares test-time registers: tokens, moved activations, options of the original runner."""
    config, params = load_encoder(case)
    io, pixels = case.io, case.io["pixel_values"]
    checks = _common("noregister_{}", *run_encoder(config, params, pixels), io)
    neurons = case.config["neurons"]
    checks += _with_neurons("", case, config, params, neurons)
    if "pass1" in case.config:
        checks += _with_neurons("pass1only_", case, config, params, case.config["pass1"])
    variants: dict[str, dict[str, Any]] = {
        "variant_mean": {"normal_values": "mean"},
        "variant_only_outliers": {"normal_values": "only_outliers"},
        "variant_same": {"normal_values": "same"},
        "variant_scale2": {"scale": 2.0},
        "variant_numreg3": {"num_registers": 3},
        "variant_numreg3_scale_list": {"num_registers": 3, "scale": (0.5, 1.0, 1.5)},
    }
    plain = Intervention(mask=_mask(config, neurons))
    for name, changes in variants.items():
        if not any(key.startswith(name) for key in io):
            continue
        out, found = run_encoder(config, params, pixels, dataclasses.replace(plain, **changes))
        checks += _common(f"{name}_{{}}", out, found, io, only_other=True)
        key = f"{name}_last_hidden_with_register"
        if key in io:
            hidden = _normalized(found["layers"][-1], config.layer_norm_eps)
            checks.append(Check(key, hidden, io[key], "encoder"))
    return checks


def _normalized(tokens: Array, epsilon: float) -> Array:
    """Returns the final norm of all rows, of which the encoder itself keeps only the patches."""
    centered = tokens - tokens.mean(axis=-1, keepdims=True)
    return centered / jnp.sqrt(jnp.mean(centered**2, axis=-1, keepdims=True) + epsilon)


def _with_neurons(
    prefix: str, case: Case, config: ViTConfig, params: Params, neurons: Mapping[str, Any]
) -> list[Check]:
    io = case.io
    intervention = Intervention(mask=_mask(config, neurons))
    out, found = run_encoder(config, params, io["pixel_values"], intervention)
    checks = _common(f"{prefix}{{}}", out, found, io)
    for block, units in neurons.items():
        layer, listed = int(block), np.array(units)
        before, after = (found[k][layer][..., listed] for k in ("mlp_act_before", "mlp_act"))
        arrays = {
            "act_before": before,
            "act_after": after,
            "signed_max": after[:, -1, 0],
        }
        for name, array in arrays.items():
            key = f"{prefix}{name}_layer{block}"
            if key in io:
                checks.append(Check(key, array, io[key], "units"))
    return checks


def _is_encoder(config: Mapping[str, Any]) -> bool:
    return config.get("encoder_cls") in MODEL_TYPES


def _has_neurons(config: Mapping[str, Any]) -> bool:
    return "neurons" in config and "vision_config" in config


RUNNERS = {
    "encoder_siglip2*": (run_plain, _is_encoder),
    "encoder_siglip2_ttr*": (run_registers, _has_neurons),
    "encoder_dinov2*": (run_plain, _is_encoder),
    "encoder_dinov3*": (run_plain, _is_encoder),
    "encoder_mae*": (run_plain, _is_encoder),
}
