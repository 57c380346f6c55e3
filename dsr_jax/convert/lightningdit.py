"""LightningDiT's table of rules. Source: DSR lightningDiT.py; spec denoiser 9.1."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dsr_jax.convert import denoiser as parts
from dsr_jax.convert.converter import DenoiserConverter
from dsr_jax.convert.rules import Rule, RuleSet
from dsr_jax.models.dit import LightningDiT


def lightningdit_rules(model: LightningDiT) -> RuleSet:
    """Returns the rules of a model with these sizes and flags."""
    width = model.hidden_size
    rules = [
        Rule("pos_embed", "pos_embed"),
        *parts.embedding_rules(),
        *parts.final_rules(width, has_scale=model.use_rmsnorm and model.final_norm),
    ]
    if model.num_registers:
        rules += parts.register_rules()
    block = parts.block_rules(model, width, model.num_heads, model.attn_kv_bias)
    rules += [rule.in_stacks(model.stacks()) for rule in block]
    return RuleSet(tuple(rules), parts.shapes_of_model(model), ("feat_rope*.freqs_*",))


def rope_buffers(model: LightningDiT) -> dict[str, np.ndarray]:
    """Returns the constants that the original stores in its state dict and requires to load it."""
    rows = parts.register_rows(model)
    return parts.rope_constants(model, model.hidden_size, model.num_heads, rows)


def obstacle(model: LightningDiT) -> str:
    """Returns what of a network the original's class cannot hold; spec denoiser 13."""
    if model.num_registers and not model.use_rope:
        return "registers without rotary position"
    return ""


def infer_model(
    state: Mapping[str, np.ndarray], *, num_heads: int = 0, register_start: int = -1
) -> LightningDiT:
    """Reads a model's sizes and flags off its state dict; arguments as `infer_sizes` has them.

    Raises:
      ConversionError: If the file is of another model, or a size is needed that it does not hold.
    """
    sizes = infer_sizes(state, "LightningDiT", num_heads=num_heads, register_start=register_start)
    return LightningDiT(**sizes)


def infer_sizes(
    state: Mapping[str, np.ndarray], model: str, *, num_heads: int, register_start: int
) -> dict[str, Any]:
    """Reads constructor arguments off a state dict.

    Args:
      state: Arrays by PyTorch name.
      model: Name of the expected model, for messages.
      num_heads: Attention heads; 0 derives them from the rope table or the q/k norm.
      register_start: First block with registers, which the file does not hold.

    Raises:
      ConversionError: If the file is of another model, or a size is needed that it does not hold.
    """
    swiglu = "blocks.0.mlp.w12.weight" in state
    output = f"blocks.0.mlp.{'w3' if swiglu else 'fc2'}.weight"
    needed = ("pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight")
    parts.check_keys(state, model, (*needed, output, "final_layer.linear.weight"))
    tokens, width = state["pos_embed"].shape[1:]
    _, channels, patch, _ = state["x_embedder.proj.weight"].shape
    heads_keys = ("feat_rope.freqs_cos", "blocks.0.attn.q_norm.weight")
    return dict(
        input_size=math.isqrt(tokens) * patch,
        in_channels=channels,
        hidden_size=width,
        depth=parts.count_blocks(state),
        num_heads=num_heads or parts.infer_heads(state, width, heads_keys),
        num_classes=state["y_embedder.embedding_table.weight"].shape[0] - 1,
        patch_size=patch,
        mlp_ratio=parts.infer_ratio(width, state[output].shape[1], swiglu),
        learn_sigma=state["final_layer.linear.weight"].shape[0] == 2 * channels * patch**2,
        use_qknorm="blocks.0.attn.q_norm.weight" in state,
        use_swiglu=swiglu,
        use_rope=any(key.startswith("feat_rope") for key in state),
        use_rmsnorm="blocks.0.norm1.weight" in state,
        # LayerNorm has no tensor in the file; only RMSNorm's scale shows a missing norm.
        final_norm="final_layer.norm_final.weight" in state or "blocks.0.norm1.weight" not in state,
        attn_kv_bias="blocks.0.attn.k_bias" in state,
        **parts.infer_registers(state, "register_tokens", register_start),
    )


CONVERTER = DenoiserConverter(
    lightningdit_rules,
    rope_buffers,
    infer_model,
    ("num_heads", "register_start"),
    "DSR's and RAE's denoiser",
    obstacle=obstacle,
)
