"""The commands that convert language models and whole text-to-image models, and their export.

Source: transformers' Qwen2 folders, Scale-RAE's folders; spec t2i 5.
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsr_jax.convert import denoiser as parts
from dsr_jax.convert.commands import add_source_arguments, open_for
from dsr_jax.convert.files import save_converted
from dsr_jax.convert.qwen2 import (
    EMBEDDING,
    HEAD,
    model_of_config,
    qwen2_rules,
    tie_head,
)
from dsr_jax.convert.qwen2 import FAMILY as QWEN2
from dsr_jax.convert.rules import flax_to_torch, lazy_params
from dsr_jax.convert.scale_rae import DENOISER, NULL, rope_buffers, scale_rae_rules
from dsr_jax.core.cli import positive_int
from dsr_jax.core.errors import ConversionError, DsrError
from dsr_jax.core.files import read_object
from dsr_jax.core.trees import count_params
from dsr_jax.core.typing import Params
from dsr_jax.models.dit import LightningDiT
from dsr_jax.models.dit_dh import DiTDH
from dsr_jax.models.embeddings import sincos_2d
from dsr_jax.models.language import LanguageModel
from dsr_jax.models.registry import TEXT_TO_IMAGE, denoiser_class, model_sizes
from dsr_jax.models.text_to_image import TextToImage
from dsr_jax.models.transformer import DiffusionTransformer

FAMILIES = (QWEN2, TEXT_TO_IMAGE)
_POSITION_ERROR = 1e-5


def convert_language_model(args: argparse.Namespace) -> None:
    """Reads a Qwen2 folder into our format."""
    opened = open_for(args, QWEN2)
    config = _read_config(opened.path)
    state = _with_prefix(opened.state)
    model = model_of_config(config, state)
    params = lazy_params(tie_head(state, model.tied), qwen2_rules(model))
    record = {"family": QWEN2, "model": model_sizes(model)}
    save_converted(args.out, params, {**record, **opened.record})
    print(f"{args.source}: Qwen2 with {count_params(params):,} parameters -> {args.out}")


def convert_text_to_image(args: argparse.Namespace) -> None:
    """Reads a Scale-RAE folder into our format."""
    opened = open_for(args, TEXT_TO_IMAGE)
    state = dict(opened.state)
    language = model_of_config(_read_config(opened.path), state)
    denoiser = infer_denoiser(state, args.num_heads, args.decoder_num_heads)
    state = tie_head(state, language.tied)
    # Absent if conditions were never dropped in training.
    state.setdefault(NULL, np.zeros(denoiser.condition_width, np.float32))
    model = TextToImage(
        input_size=denoiser.input_size,
        in_channels=denoiser.in_channels,
        num_classes=denoiser.num_classes,
        language=language,
        denoiser=denoiser,
        connector="linear" if "diff_head_projector.weight" in state else "mlp2",
        understanding="model.mm_projector.0.weight" in state,
        text_length=denoiser.grid**2 + 256,
    )
    _check_positions(state, denoiser)
    params = lazy_params(state, scale_rae_rules(model))
    record = {"family": TEXT_TO_IMAGE, "model": model_sizes(model)}
    save_converted(args.out, params, {**record, **opened.record})
    print(f"{args.source}: Scale-RAE with {count_params(params):,} parameters -> {args.out}")


def infer_denoiser(
    state: Mapping[str, np.ndarray], num_heads: int = 0, decoder_num_heads: int = 0
) -> DiffusionTransformer:
    """Reads a denoiser's sizes off Scale-RAE's state dict.

    Args:
      state: Arrays by PyTorch name.
      num_heads: Attention heads; 0 derives them from the rope table.
      decoder_num_heads: The same of the head.

    Raises:
      ConversionError: If the file is of another model, or a size is needed that it does not hold.
    """
    own = {
        name.removeprefix(DENOISER): value
        for name, value in state.items()
        if name.startswith(DENOISER)
    }
    output = "dit_blocks.0.mlp.w3.weight"
    needed = ("pos_embed", "x_embedder.proj.weight", "t_embedder.mlp.2.weight", output)
    parts.check_keys(own, "Scale-RAE", needed)
    width, channels, patch, _ = own["x_embedder.proj.weight"].shape
    total = 1 + max(int(name.split(".")[1]) for name in own if name.startswith("dit_blocks."))
    widths = [own[f"dit_blocks.{i}.attn.proj.weight"].shape[0] for i in range(total)]
    head = "s_embedder.proj.weight" in own
    depth = widths.count(width) if head else total
    head_width = own["s_embedder.proj.weight"].shape[0] if head else width
    if head and head_width == width:
        raise ConversionError(
            f"the file's {total} blocks are all {width} wide, so that those of the head cannot be "
            "told from the encoder's",
            "convert a model whose head has another width",
        )
    rope = ("enc_rope" if head else "feat_rope") + ".freqs_cos"
    sizes: dict[str, Any] = {
        "input_size": math.isqrt(own["pos_embed"].shape[1]) * patch,
        "in_channels": channels,
        "num_classes": 1,
        "hidden_size": width,
        "depth": depth,
        "num_heads": num_heads or parts.infer_heads(own, width, (rope,)),
        "patch_size": patch,
        "mlp_ratio": parts.infer_ratio(width, own[output].shape[1], True),
        "condition_width": own["t_embedder.mlp.2.weight"].shape[0],
    }
    if not head:
        return LightningDiT(**sizes)
    return DiTDH(
        **sizes,
        decoder_hidden_size=head_width,
        decoder_depth=total - depth,
        decoder_num_heads=decoder_num_heads
        or parts.infer_heads(own, head_width, ("dec_rope.freqs_cos",), "--decoder-num-heads"),
    )


def _check_positions(state: Mapping[str, np.ndarray], model: DiffusionTransformer) -> None:
    """Checks that the fixed table of positions is the formula's.

    Raises:
      ConversionError: If it is another.
    """
    found = np.asarray(state[f"{DENOISER}pos_embed"], np.float32)[0]
    error = float(np.abs(found - sincos_2d(model.hidden_size, model.grid)).max())
    # A table in bfloat16 has three digits.
    allowed = _POSITION_ERROR if state[f"{DENOISER}pos_embed"].dtype == np.float32 else 1e-2
    if error > allowed:
        raise ConversionError(
            f"{DENOISER}pos_embed differs from the sine-cosine table by {error:.2g}",
            "the tokens' order or positions are not Scale-RAE's: use the file that it released",
        )


def export_text_model(params: Params, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the original's state dict of a converted language or text-to-image model.

    Raises:
      ConversionError: If the model has what the original lacks.
    """
    model = text_model_of_record(record)
    if isinstance(model, LanguageModel):
        return flax_to_torch(params, qwen2_rules(model))
    if model.denoiser.num_registers:
        raise ConversionError(
            f"Scale-RAE has no registers, and this denoiser has {model.denoiser.num_registers}",
            "export to a folder (--out without .pt or .safetensors), which sample and train read",
        )
    if not model.denoiser.condition_silu:
        raise ConversionError(
            "Scale-RAE applies SiLU to time plus text, and this denoiser does not",
            "export to a folder (--out without .pt or .safetensors)",
        )
    return flax_to_torch(params, scale_rae_rules(model)) | rope_buffers(model.denoiser)


def text_model_of_record(record: Mapping[str, Any]) -> LanguageModel | TextToImage:
    """Returns the network of a converted folder's record."""
    sizes = dict(record["model"])
    if record["family"] == QWEN2:
        return LanguageModel(**sizes)
    denoiser = dict(sizes["denoiser"])
    kind: Any = denoiser_class(denoiser.pop("name"))
    language = {key: value for key, value in sizes["language"].items() if key != "name"}
    return TextToImage(
        **{**sizes, "language": LanguageModel(**language), "denoiser": kind(**denoiser)}
    )


def add_text_commands(families: Any) -> None:
    """Adds the commands to the subparsers."""
    parser = families.add_parser(QWEN2, help="language model: Qwen2, Qwen2.5")
    add_source_arguments(parser, "snapshot folder or hub id, with config.json")
    parser.set_defaults(run=convert_language_model)
    parser = families.add_parser(TEXT_TO_IMAGE, help="Scale-RAE's text-to-image model")
    add_source_arguments(parser, "snapshot folder with config.json")
    for flag, where in (("--num-heads", "the denoiser"), ("--decoder-num-heads", "its head")):
        text = f"attention heads of {where}; default: read off the rope table"
        parser.add_argument(flag, type=positive_int, default=0, help=text)
    parser.set_defaults(run=convert_text_to_image)


def _read_config(path: Path) -> dict[str, Any]:
    """Reads the config.json of a folder, or beside a file.

    Raises:
      ConversionError: If there is none, or a damaged one.
    """
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        return read_object(file)
    except (OSError, DsrError) as error:
        raise ConversionError(
            f"{file} cannot be read: {error}", "give the folder that has config.json and weights"
        ) from error


def _with_prefix(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a language model's state under full names, also of a file without `model.`."""
    if EMBEDDING in state:
        return dict(state)
    return {name if name == HEAD else f"model.{name}": value for name, value in state.items()}
