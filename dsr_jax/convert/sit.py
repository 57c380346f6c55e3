"""SiT's table of rules. Source: SiT models.py; spec denoiser 9.3."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from dsr_jax.convert import denoiser as parts
from dsr_jax.convert.converter import DenoiserConverter
from dsr_jax.convert.lightningdit import infer_sizes, lightningdit_rules, rope_buffers
from dsr_jax.convert.rules import RuleSet
from dsr_jax.models.sit import SIT, SiT


def sit_rules(model: SiT) -> RuleSet:
    """Returns the rules of a model: LightningDiT's without frequencies of time.

    Without rotary position there is nothing to drop, either.
    """
    table = lightningdit_rules(model)
    rules = tuple(rule for rule in table.rules if rule.source != "t_embedder.W")
    return dataclasses.replace(table, rules=rules, dropped=table.dropped if model.use_rope else ())


def infer_model(
    state: Mapping[str, np.ndarray], *, num_heads: int = 0, register_start: int = -1
) -> SiT:
    """Reads a model's sizes and flags off its state dict.

    Args:
      state: Arrays by PyTorch name.
      num_heads: Attention heads, which no tensor shows; 0 for those of the released sizes.
      register_start: First block with registers, which the file does not hold.

    Raises:
      ConversionError: If the file is of another model, or a size is needed that it does not hold.
    """
    parts.check_keys(state, "SiT", ("pos_embed", "blocks.0.attn.qkv.weight"))
    width, depth = state["pos_embed"].shape[-1], parts.count_blocks(state)
    known = [
        sizes["num_heads"]
        for sizes in SIT.values()
        if (sizes["hidden_size"], sizes["depth"]) == (width, depth)
    ]
    heads = num_heads or next(iter(known), 0)
    return SiT(**infer_sizes(state, "SiT", num_heads=heads, register_start=register_start))


CONVERTER = DenoiserConverter(
    sit_rules,
    rope_buffers,
    infer_model,
    ("num_heads", "register_start"),
    "SiT, the denoiser on the latents of a VAE",
    has_registers=False,
)
