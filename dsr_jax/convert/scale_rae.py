"""Scale-RAE's table of rules: language model, queries, connector and denoiser of a text-to-image
model. Source: Scale-RAE; spec t2i 5.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from dsr_jax.convert import denoiser as parts
from dsr_jax.convert.qwen2 import language_rules
from dsr_jax.convert.rules import CONV, Rule, RuleSet, shapes_of
from dsr_jax.models.depth import Stack
from dsr_jax.models.dit_dh import DiTDH
from dsr_jax.models.text_to_image import TextToImage, initial_inputs
from dsr_jax.models.transformer import DiffusionTransformer

DENOISER = "diff_head.model."
"""Begin of the names of the denoiser."""

NULL = f"{DENOISER}y_embedder.dropout_embedding"


def denoiser_rules(model: DiffusionTransformer, prefix: str = "") -> list[Rule]:
    """Returns the rules of a denoiser of text, whose parameters lie below `prefix`.

    With a head, the original calls the encoder's patches x_embedder and the head's s_embedder, the
    other way round than for classes.
    """
    rules = [
        Rule("pos_embed", "pos_embed"),
        *parts.pair("t_embedder.mlp.0", "t_embedder/mlp_0"),
        *parts.pair("t_embedder.mlp.2", "t_embedder/mlp_2"),
        Rule("y_embedder.dropout_embedding", "y_embedder/dropout_embedding"),
    ]
    head = model if isinstance(model, DiTDH) else None
    width = head.decoder_hidden_size if head else model.hidden_size
    rules += parts.final_rules(width, has_scale=model.use_rmsnorm)
    rules += parts.pair("x_embedder.proj", f"{'s' if head else 'x'}_embedder/proj", CONV)
    blocks = [(parts.block_rules(model, model.hidden_size, model.num_heads), model.stacks())]
    if head:
        rules += parts.pair("s_embedder.proj", "x_embedder/proj", CONV)
        if width != model.hidden_size:
            rules += parts.pair("s_projector", "s_projector")
        last = (Stack("dec_blocks", model.depth, model.depth + head.decoder_depth),)
        blocks.append((parts.block_rules(model, width, head.decoder_num_heads), last))
    placed = [
        dataclasses.replace(
            rule, source=f"{DENOISER}{rule.source}", target=f"{prefix}{rule.target}"
        )
        for rule in rules
    ]
    for block, stacks in blocks:
        below = tuple(dataclasses.replace(s, name=f"{prefix}{s.name}") for s in stacks)
        placed += [
            dataclasses.replace(
                rule, source=f"{DENOISER}dit_blocks.{{i}}.{rule.source}", stacks=below
            )
            for rule in block
        ]
    return placed


def rope_buffers(model: DiffusionTransformer) -> dict[str, np.ndarray]:
    """Returns the tables of rope that the original stores in its state dict."""
    heads = {"feat_rope": (model.hidden_size, model.num_heads)}
    if isinstance(model, DiTDH):
        heads = {
            "enc_rope": heads["feat_rope"],
            "dec_rope": (model.decoder_hidden_size, model.decoder_num_heads),
        }
    tables: dict[str, np.ndarray] = {}
    for name, (width, count) in heads.items():
        tables |= parts.rope_constants(model, width, count, {f"{DENOISER}{name}": 0})
    return tables


def scale_rae_rules(model: TextToImage) -> RuleSet:
    """Returns the rules of a whole model."""
    rules = [
        *language_rules(model.language, "language/"),
        *denoiser_rules(model.denoiser, "denoiser/"),
        Rule("model.latent_queries", "queries"),
    ]
    if model.understanding:
        for i, source in enumerate(("model.mm_projector.0", "model.mm_projector.2")):
            rules += parts.pair(source, f"project/fc{i}")
    if model.connector == "linear":
        rules += parts.pair("diff_head_projector", "connect/fc0")
    else:
        rules += parts.pair("diff_head_projector.0", "connect/fc0")
        rules += parts.pair("diff_head_projector.2", "connect/fc1")
    latent = (model.denoiser.input_size, model.denoiser.input_size, model.denoiser.in_channels)
    abstract: Any = nn.unbox(
        jax.eval_shape(model.init, jax.random.key(0), *initial_inputs(model, latent))
    )
    return RuleSet(tuple(rules), shapes_of(abstract["params"]), (f"{DENOISER}*_rope.freqs_*",))
