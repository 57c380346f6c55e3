"""LightningDiT's table of rules. Source: DSR lightningDiT.py; spec denoiser 9.1."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.convert.rules import CONV, LINEAR, Rule, RuleSet, cut_stacks, linear, shapes_of, vector
from dsr_jax.core.errors import ConversionError
from dsr_jax.models.blocks import mlp_width
from dsr_jax.models.dit import LightningDiT
from dsr_jax.models.rope import rope_tables


def _pair(source: str, target: str, weight: Any = LINEAR, bias: Any = None) -> list[Rule]:
    """Rules of a layer's weight and bias."""
    return [
        Rule(f"{source}.weight", f"{target}/kernel", weight),
        Rule(f"{source}.bias", f"{target}/bias", bias or vector()),
    ]


def lightningdit_rules(model: LightningDiT) -> RuleSet:
    """The table for a model of these sizes and flags."""
    width, heads = model.hidden_size, model.num_heads
    head_dim = width // heads
    top = [
        Rule("pos_embed", "pos_embed"),
        *_pair("x_embedder.proj", "x_embedder/proj", CONV),
        Rule("t_embedder.W", "t_embedder/W"),
        *_pair("t_embedder.mlp.0", "t_embedder/mlp_0"),
        *_pair("t_embedder.mlp.2", "t_embedder/mlp_2"),
        Rule("y_embedder.embedding_table.weight", "y_embedder/embedding_table/embedding"),
        *_pair(
            "final_layer.adaLN_modulation.1",
            "final_layer/adaLN",
            linear(outputs=(2, width)),
            vector(2, width),
        ),
        *_pair("final_layer.linear", "final_layer/linear"),
    ]
    if model.use_rmsnorm and model.final_norm:
        top.append(Rule("final_layer.norm_final.weight", "final_layer/norm_final/scale"))
    if model.num_registers:
        top += [Rule(name, name) for name in ("register_tokens", "register_pos_embed")]
    block = [
        *_pair(
            "attn.qkv", "attn/qkv", linear(outputs=(3, heads, head_dim)), vector(3, heads, head_dim)
        ),
        *_pair("attn.proj", "attn/proj", linear(inputs=(heads, head_dim))),
        *_pair("adaLN_modulation.1", "adaLN", linear(outputs=(6, width)), vector(6, width)),
        *_feed_forward(model),
    ]
    if model.use_rmsnorm:
        block += [Rule(f"{name}.weight", f"{name}/scale") for name in ("norm1", "norm2")]
    if model.use_qknorm:
        for name in ("q_norm", "k_norm"):
            block.append(Rule(f"attn.{name}.weight", f"attn/{name}/scale"))
            if not model.use_rmsnorm:
                block.append(Rule(f"attn.{name}.bias", f"attn/{name}/bias"))
    if model.attn_kv_bias:
        block += [Rule(f"attn.{name}", f"attn/{name}") for name in ("k_bias", "v_bias")]
    stacks = cut_stacks(model.depth, model.num_registers, model.register_start)
    layers = [Rule("blocks.{i}." + r.source, r.target, r.layout, stacks) for r in block]
    return RuleSet((*top, *layers), shapes_of(_abstract(model)), ("feat_rope*.freqs_*",))


def rope_buffers(model: LightningDiT) -> dict[str, np.ndarray]:
    """The constants that the original keeps in its state dict, and needs there to load it."""
    if not model.use_rope:
        return {}
    head_dim, grid = model.hidden_size // model.num_heads, model.input_size // model.patch_size
    prefixes = {"feat_rope": 0}
    if model.num_registers:
        prefixes["feat_rope_incontext"] = model.num_registers
    return {
        f"{name}.freqs_{part}": table
        for name, prefix in prefixes.items()
        for part, table in zip(("cos", "sin"), rope_tables(head_dim, grid, prefix), strict=True)
    }


def _feed_forward(model: LightningDiT) -> list[Rule]:
    if model.use_swiglu:
        hidden = mlp_width(model.hidden_size, model.mlp_ratio, True)
        w12 = _pair("mlp.w12", "mlp/w12", linear(outputs=(2, hidden)), vector(2, hidden))
        return [*w12, *_pair("mlp.w3", "mlp/w3")]
    return [*_pair("mlp.fc1", "mlp/fc1"), *_pair("mlp.fc2", "mlp/fc2")]


def _abstract(model: LightningDiT) -> Any:
    x = jnp.zeros((1, model.input_size, model.input_size, model.in_channels))
    args = x, jnp.zeros(1), jnp.zeros(1, jnp.int32)
    return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *args))["params"]


def infer_model(
    state: Mapping[str, np.ndarray], *, num_heads: int = 0, register_start: int = -1
) -> LightningDiT:
    """Reads a model's sizes and flags off its state dict.

    Args:
      state: Arrays by PyTorch name.
      num_heads: Attention heads; 0 derives them from the rope table or the q/k norm.
      register_start: First block with registers, which the file does not hold.

    Raises:
      ConversionError: If the file is of another model, or a size is needed that it does not hold.
    """
    swiglu = "blocks.0.mlp.w12.weight" in state
    output = f"blocks.0.mlp.{'w3' if swiglu else 'fc2'}.weight"
    needed = ("pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight")
    absent = [key for key in (*needed, output, "final_layer.linear.weight") if key not in state]
    if absent:
        raise ConversionError(
            f"this is no LightningDiT: {', '.join(absent)} missing; it begins with "
            f"{', '.join(list(state)[:4])}",
            "name the family that the file belongs to",
        )
    tokens, width = state["pos_embed"].shape[1:]
    _, channels, patch, _ = state["x_embedder.proj.weight"].shape
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    if registers and register_start < 0:
        raise ConversionError(
            f"the file has {registers} registers but does not say before which block they join",
            "give --register-start (the paper: 8 of 28 blocks, 4 of 12)",
        )
    hidden = state[output].shape[1]
    return LightningDiT(
        input_size=math.isqrt(tokens) * patch,
        in_channels=channels,
        hidden_size=width,
        depth=depth,
        num_heads=num_heads or _infer_heads(state, width),
        num_classes=state["y_embedder.embedding_table.weight"].shape[0] - 1,
        patch_size=patch,
        mlp_ratio=_infer_ratio(width, hidden, swiglu),
        learn_sigma=state["final_layer.linear.weight"].shape[0] == 2 * channels * patch**2,
        use_qknorm="blocks.0.attn.q_norm.weight" in state,
        use_swiglu=swiglu,
        use_rope=any(key.startswith("feat_rope") for key in state),
        use_rmsnorm="blocks.0.norm1.weight" in state,
        # LayerNorm leaves no trace in the file; only RMSNorm's scale tells a missing norm.
        final_norm="final_layer.norm_final.weight" in state or "blocks.0.norm1.weight" not in state,
        attn_kv_bias="blocks.0.attn.k_bias" in state,
        num_registers=registers,
        register_start=max(register_start, 0) if registers else 0,
    )


def _infer_heads(state: Mapping[str, np.ndarray], width: int) -> int:
    for key in ("feat_rope.freqs_cos", "blocks.0.attn.q_norm.weight"):
        if key in state:
            return width // state[key].shape[-1]
    raise ConversionError("the file does not tell the number of heads", "give --num-heads")


def _infer_ratio(width: int, hidden: int, swiglu: bool) -> float:
    """A ratio that gives `hidden` units; halves and quarters are tried before odd values."""
    for quarters in range(1, 65):
        ratio = quarters / 4
        if mlp_width(width, ratio, swiglu) == hidden:
            return ratio
    raise ConversionError(f"{hidden} hidden units fit no simple mlp_ratio of width {width}")
