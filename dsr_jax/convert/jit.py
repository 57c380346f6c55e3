"""JiT's table of rules. Source: JiT model_jit.py; spec denoiser 9.4.

The original keeps the network inside a wrapper, whose checkpoints put `net.` before every name.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dsr_jax.convert import denoiser as parts
from dsr_jax.convert.converter import DenoiserConverter
from dsr_jax.convert.rules import CONV, Rule, RuleSet
from dsr_jax.core.errors import ConversionError
from dsr_jax.models.jit import JIT, JiT


def jit_rules(model: JiT) -> RuleSet:
    """Returns the rules of a model with these sizes and flags."""
    width = model.hidden_size
    rules = [
        Rule("pos_embed", "pos_embed"),
        Rule("x_embedder.proj1.weight", "x_embedder/proj1/kernel", CONV),
        *parts.pair("x_embedder.proj2", "x_embedder/proj2", CONV),
        *parts.condition_rules(),
        *parts.final_rules(width, has_scale=model.use_rmsnorm),
    ]
    if model.num_class_tokens:
        rules.append(Rule("in_context_posemb", "in_context_posemb"))
    if model.num_registers:
        rules += parts.register_rules()
    rules += [
        rule.in_stacks(model.stacks()) for rule in parts.block_rules(model, width, model.num_heads)
    ]
    return RuleSet(tuple(rules), parts.shapes_of_model(model), ("feat_rope*.freqs_*",))


def no_constants(model: JiT) -> dict[str, np.ndarray]:
    """Returns {}: the original computes rope's tables anew and has no other buffers."""
    del model
    return {}


def infer_model(
    state: Mapping[str, np.ndarray],
    *,
    num_heads: int = 0,
    class_token_start: int = -1,
    register_start: int = -1,
) -> JiT:
    """Reads a model's sizes and flags off its state dict.

    Args:
      state: Arrays by PyTorch name, without the wrapper's prefix.
      num_heads: Attention heads; 0 derives them from the rope table or the q/k norm.
      class_token_start: First block with class tokens, which the file does not hold; negative for
        that of the released sizes.
      register_start: The same of registers, which have no released sizes.

    Raises:
      ConversionError: If the file is of another model, or a size is needed that it does not hold.
    """
    swiglu = "blocks.0.mlp.w12.weight" in state
    output = f"blocks.0.mlp.{'w3' if swiglu else 'fc2'}.weight"
    needed = ("pos_embed", "x_embedder.proj1.weight", "y_embedder.embedding_table.weight")
    parts.check_keys(state, "JiT", (*needed, output))
    tokens, width = state["pos_embed"].shape[1:]
    bottleneck, channels, patch, _ = state["x_embedder.proj1.weight"].shape
    heads_keys = ("feat_rope.freqs_cos", "blocks.0.attn.q_norm.weight")
    return JiT(
        input_size=math.isqrt(tokens) * patch,
        in_channels=channels,
        hidden_size=width,
        depth=parts.count_blocks(state),
        num_heads=num_heads or parts.infer_heads(state, width, heads_keys),
        num_classes=state["y_embedder.embedding_table.weight"].shape[0] - 1,
        patch_size=patch,
        mlp_ratio=parts.infer_ratio(width, state[output].shape[1], swiglu),
        use_qknorm="blocks.0.attn.q_norm.weight" in state,
        use_swiglu=swiglu,
        use_rmsnorm="blocks.0.norm1.weight" in state,
        bottleneck_dim=bottleneck,
        **_infer_class_tokens(state, class_token_start),
        **parts.infer_registers(state, "register_tokens", register_start),
    )


def _infer_class_tokens(state: Mapping[str, np.ndarray], start: int) -> dict[str, Any]:
    """Returns the number of class tokens and their first block, as constructor arguments."""
    if "in_context_posemb" not in state:
        return {"num_class_tokens": 0, "class_token_start": 0}
    _, count, width = state["in_context_posemb"].shape
    depth = parts.count_blocks(state)
    released = {
        (sizes["hidden_size"], sizes["depth"]): sizes["class_token_start"] for sizes in JIT.values()
    }
    if start < 0:
        start = released.get((width, depth), -1)
    if start < 0:
        raise ConversionError(
            f"the file has {count} class tokens but not the block before which they are inserted",
            "give --class-token-start (JiT-B: 4 of 12, JiT-L: 8 of 24, JiT-H: 10 of 32)",
        )
    return {"num_class_tokens": count, "class_token_start": start}


CONVERTER = DenoiserConverter(
    jit_rules,
    no_constants,
    infer_model,
    ("num_heads", "class_token_start", "register_start"),
    "JiT, the denoiser on pixels",
    prefix="net.",
    entries=("model_ema1", "model_ema2", "model"),
    has_registers=False,
)
"""The first of its entries is what the original samples with."""
