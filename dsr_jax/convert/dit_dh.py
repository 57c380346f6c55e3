"""DiTDH's table of rules. Source: DSR DDT.py (DiTwDDTHead); spec denoiser 9.2."""

import math
from collections.abc import Mapping

import numpy as np

from dsr_jax.convert import denoiser as parts
from dsr_jax.convert.converter import DenoiserConverter
from dsr_jax.convert.rules import CONV, Rule, RuleSet, Stack
from dsr_jax.core.errors import ConversionError
from dsr_jax.models.dit_dh import DiTDH


def dit_dh_rules(model: DiTDH) -> RuleSet:
    """Returns the rules of a model with these sizes and flags.

    The original numbers the head's blocks on from the encoder's.
    """
    depth, head_width = model.depth, model.decoder_hidden_size
    rules = [
        *parts.embedding_rules(),
        *parts.pair("s_embedder.proj", "s_embedder/proj", CONV),
        *parts.final_rules(head_width, has_scale=model.use_rmsnorm),
    ]
    if model.use_pos_embed:
        rules.append(Rule("pos_embed", "pos_embed"))
    if head_width != model.hidden_size:
        rules += parts.pair("s_projector", "s_projector")
    if model.num_registers:
        rules += [*parts.register_rules("enc_"), *parts.register_rules("dec_")]
    decoder = (Stack("dec_blocks", depth, depth + model.decoder_depth),)
    for block, stacks in (
        (parts.block_rules(model, model.hidden_size, model.num_heads), model.stacks()),
        (parts.block_rules(model, head_width, model.decoder_num_heads), decoder),
    ):
        rules += [rule.in_stacks(stacks) for rule in block]
    dropped = ("enc_feat_rope*.freqs_*", "dec_feat_rope*.freqs_*")
    return RuleSet(tuple(rules), parts.shapes_of_model(model), dropped)


def rope_buffers(model: DiTDH) -> dict[str, np.ndarray]:
    """Returns the constants that the original stores in its state dict and requires to load it."""
    encoder = model.hidden_size, model.num_heads
    head = model.decoder_hidden_size, model.decoder_num_heads
    return parts.rope_constants(
        model, *encoder, parts.register_rows(model, "enc_")
    ) | parts.rope_constants(model, *head, parts.register_rows(model, "dec_"))


def obstacle(model: DiTDH) -> str:
    """Returns what of a network the original's class cannot hold; spec denoiser 13."""
    if model.patch_size != 1:
        return f"patches of {model.patch_size}, where it has patches of 1 only"
    if not model.use_rope:
        return "no rotary position"
    return ""


def infer_model(
    state: Mapping[str, np.ndarray],
    *,
    num_heads: int = 0,
    decoder_num_heads: int = 0,
    decoder_depth: int = 0,
    register_start: int = -1,
) -> DiTDH:
    """Reads a model's sizes and flags off its state dict.

    Args:
      state: Arrays by PyTorch name.
      num_heads: Attention heads of the encoder; 0 derives them from the rope table or q/k norm.
      decoder_num_heads: The same of the head.
      decoder_depth: Blocks of the head; 0 derives them from the blocks' widths, which works
        only where the encoder's is another.
      register_start: First block of the encoder with registers, which the file does not hold.

    Raises:
      ConversionError: If the file is of another model, or a size is needed that it does not hold.
    """
    swiglu = "blocks.0.mlp.w12.weight" in state
    output = f"blocks.0.mlp.{'w3' if swiglu else 'fc2'}.weight"
    needed = ("s_embedder.proj.weight", "x_embedder.proj.weight", "final_layer.linear.weight")
    parts.check_keys(state, "DiTDH", (*needed, "y_embedder.embedding_table.weight", output))
    width, channels, patch, _ = state["s_embedder.proj.weight"].shape
    head_width = state["x_embedder.proj.weight"].shape[0]
    total = parts.count_blocks(state)
    head_depth = decoder_depth or _infer_head_depth(state, total, width, head_width)
    depth = _encoder_depth(total, head_depth)
    return DiTDH(
        input_size=_infer_grid(state) * patch,
        in_channels=channels,
        hidden_size=width,
        depth=depth,
        num_heads=num_heads
        or parts.infer_heads(
            state, width, ("enc_feat_rope.freqs_cos", "blocks.0.attn.q_norm.weight")
        ),
        num_classes=state["y_embedder.embedding_table.weight"].shape[0] - 1,
        patch_size=patch,
        mlp_ratio=parts.infer_ratio(width, state[output].shape[1], swiglu),
        use_qknorm="blocks.0.attn.q_norm.weight" in state,
        use_swiglu=swiglu,
        use_rope="enc_feat_rope.freqs_cos" in state,
        use_rmsnorm="blocks.0.norm1.weight" in state,
        decoder_hidden_size=head_width,
        decoder_depth=head_depth,
        decoder_num_heads=decoder_num_heads
        or parts.infer_heads(
            state,
            head_width,
            ("dec_feat_rope.freqs_cos", f"blocks.{depth}.attn.q_norm.weight"),
            "--decoder-num-heads",
        ),
        use_pos_embed="pos_embed" in state,
        **parts.infer_registers(state, "enc_register_tokens", register_start),
    )


def _encoder_depth(total: int, head_depth: int) -> int:
    if total <= head_depth:
        raise ConversionError(
            f"the file's {total} blocks leave none for the encoder before a head of {head_depth}",
            "give --decoder-depth (the official models: 2)",
        )
    return total - head_depth


def _infer_head_depth(
    state: Mapping[str, np.ndarray], total: int, width: int, head_width: int
) -> int:
    if width == head_width:
        raise ConversionError(
            f"the file's {total} blocks are all {width} wide, so that those of the head "
            "cannot be told from the encoder's",
            "give --decoder-depth (the official models: 2)",
        )
    widths = [len(state.get(f"blocks.{i}.attn.proj.weight", ())) for i in range(total)]
    return widths.count(head_width)


def _infer_grid(state: Mapping[str, np.ndarray]) -> int:
    if "pos_embed" in state:
        return math.isqrt(state["pos_embed"].shape[1])
    if "enc_feat_rope.freqs_cos" in state:
        return math.isqrt(state["enc_feat_rope.freqs_cos"].shape[0])
    raise ConversionError(
        "the input's size cannot be read off the file: it has neither pos_embed nor "
        "enc_feat_rope.freqs_cos",
        "convert the file as the official code wrote it",
    )


CONVERTER = DenoiserConverter(
    dit_dh_rules,
    rope_buffers,
    infer_model,
    ("num_heads", "register_start", "decoder_num_heads", "decoder_depth"),
    "their denoiser with a wide shallow head (DiTwDDTHead)",
    obstacle=obstacle,
)
