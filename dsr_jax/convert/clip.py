"""CLIP folders of the hub, with their tokenizer, as one converted folder.

Source: transformers modeling_clip.py and configuration_clip.py.
"""

import argparse
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsr_jax.convert.fetch import fetch_snapshot
from dsr_jax.convert.files import check_new_folder, load_converted, save_converted, source_record
from dsr_jax.convert.readers import read_state
from dsr_jax.convert.rules import (
    CONV,
    LINEAR,
    SAME,
    Layout,
    Rule,
    RuleSet,
    shapes_of,
    torch_to_flax,
)
from dsr_jax.core.errors import ConversionError
from dsr_jax.core.files import read_json
from dsr_jax.core.trees import count_params
from dsr_jax.core.typing import Params
from dsr_jax.models.clip import ACTIVATIONS, Clip, TowerSizes

FAMILY = "clip"
"""What conversion.json calls it."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "vision_config": {
        **{"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
        **{"intermediate_size": 3072, "image_size": 224, "patch_size": 32},
        **{"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    },
    "text_config": {
        **{"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8},
        **{"intermediate_size": 2048, "vocab_size": 49408, "max_position_embeddings": 77},
        **{"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 49407},
    },
}
"""What transformers takes for a value that config.json leaves out."""


def clip_from_hub(record: Mapping[str, Any]) -> Clip:
    """Returns the network that the config.json of a hub folder describes.

    Raises:
      ConversionError: If it is no CLIP, or has an option that is not supported.
    """
    if record.get("model_type") != "clip":
        raise ConversionError(
            f"config.json describes a {record.get('model_type')!r}, not CLIP",
            "give a folder such as openai/clip-vit-base-patch32",
        )
    sizes, towers = {}, []
    for part, defaults in _DEFAULTS.items():
        sizes[part] = values = {**defaults, **(record.get(part) or {})}
        if values["hidden_act"] not in ACTIVATIONS or values["layer_norm_eps"] != 1e-5:
            raise ConversionError(
                f"{part} has hidden_act={values['hidden_act']!r} and "
                f"layer_norm_eps={values['layer_norm_eps']!r}",
                f"supported are {', '.join(ACTIVATIONS)} and 1e-5",
            )
        towers.append(
            TowerSizes(
                values["hidden_size"],
                values["num_hidden_layers"],
                values["num_attention_heads"],
                values["intermediate_size"],
                values["hidden_act"],
            )
        )
    vision, text = sizes["vision_config"], sizes["text_config"]
    # Old files hold 2 for the end, which transformers reads as the largest id of a text.
    end = text["eos_token_id"] if text["eos_token_id"] != 2 else text["vocab_size"] - 1
    return Clip(
        vision=towers[0],
        text=towers[1],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        vocab_size=text["vocab_size"],
        text_length=text["max_position_embeddings"],
        end_id=end,
        width=record.get("projection_dim", 512),
    )


def clip_rules(network: Clip) -> RuleSet:
    """Returns the rules of a hub file."""

    def pair(source: str, target: str, names: tuple[str, str], layout: Layout) -> list[Rule]:
        return [
            Rule(f"{source}.weight", f"{target}/{names[0]}", layout),
            Rule(f"{source}.bias", f"{target}/{names[1]}"),
        ]

    def norm(source: str, target: str) -> list[Rule]:
        return pair(source, target, ("scale", "bias"), SAME)

    vision, text = "vision_model", "text_model"
    rules = [
        Rule(f"{vision}.embeddings.patch_embedding.weight", "patch/kernel", CONV),
        Rule(f"{vision}.embeddings.class_embedding", "class_token"),
        Rule(f"{vision}.embeddings.position_embedding.weight", "image_positions"),
        *norm(f"{vision}.pre_layrnorm", "vision_pre_norm"),
        *norm(f"{vision}.post_layernorm", "vision_norm"),
        Rule("visual_projection.weight", "vision_projection/kernel", LINEAR),
        Rule(f"{text}.embeddings.token_embedding.weight", "words/embedding"),
        Rule(f"{text}.embeddings.position_embedding.weight", "text_positions"),
        *norm(f"{text}.final_layer_norm", "text_norm"),
        Rule("text_projection.weight", "text_projection/kernel", LINEAR),
    ]
    linears = {f"self_attn.{name}_proj": name for name in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": "fc1", "mlp.fc2": "fc2"}
    for source, target, sizes in (
        (vision, "vision", network.vision),
        (text, "text_tower", network.text),
    ):
        for number in range(sizes.depth):
            layer, block = f"{source}.encoder.layers.{number}", f"{target}/block{number}"
            for number_of_norm in (1, 2):
                rules += norm(
                    f"{layer}.layer_norm{number_of_norm}", f"{block}/norm{number_of_norm}"
                )
            for name, ours in linears.items():
                rules += pair(f"{layer}.{name}", f"{block}/{ours}", ("kernel", "bias"), LINEAR)
    images = jnp.zeros((1, network.image_size, network.image_size, 3))
    tokens = jnp.zeros((1, network.text_length), jnp.int32)
    abstract = nn.unbox(jax.eval_shape(network.init, jax.random.key(0), images, tokens))
    return RuleSet(
        tuple(rules), shapes_of(abstract["params"]), ("logit_scale", "*.embeddings.position_ids")
    )


def load_clip(folder: str | Path) -> tuple[Clip, Params, dict[str, Any]]:
    """Reads what was converted into a folder: network, parameters and record.

    Raises:
      ConversionError: If there is nothing, or a model of another kind.
    """
    params, record = load_converted(folder)
    if record["family"] != FAMILY:
        raise ConversionError(
            f"{folder} holds a {record['family']}, not CLIP",
            f"name a folder that python -m dsr_jax.convert {FAMILY} wrote",
        )
    model = dict(record["model"])
    vision, text = (TowerSizes(**model.pop(name)) for name in ("vision", "text"))
    return Clip(vision=vision, text=text, **model), params, record


def convert_clip(args: argparse.Namespace) -> None:
    """Reads CLIP and its tokenizer into our format."""
    check_new_folder(args.out)
    path = fetch_snapshot(args.source)
    if not (path / "config.json").is_file():
        raise ConversionError(f"{path} holds no config.json", "give a hub folder of CLIP")
    network = clip_from_hub(read_json(path / "config.json"))
    params = torch_to_flax(read_state(path), clip_rules(network))
    names = [name for name in TOKENIZER_FILES if (path / name).is_file()]
    if not {"tokenizer.json", "vocab.json"} & {*names}:
        raise ConversionError(f"{path} holds no tokenizer", "copy tokenizer.json into it")
    sizes = {
        field.name: getattr(network, field.name)
        for field in dataclasses.fields(network)
        if field.name not in ("parent", "name")
    }
    sizes |= {name: dataclasses.asdict(sizes[name]) for name in ("vision", "text")}
    record = {"family": FAMILY, "model": sizes, **source_record(args.source)}
    save_converted(args.out, params, record)
    for name in names:
        shutil.copyfile(path / name, Path(args.out) / name)
    print(f"{args.source}: CLIP with {count_params(params):,} parameters -> {args.out}")


def add_clip_command(families: Any) -> None:
    """Adds CLIP to the command line's families (argparse subparsers)."""
    parser = families.add_parser(FAMILY, help="embeddings of images and texts, for CLIPScore")
    parser.add_argument("--source", required=True, help="hub folder, such as clip-vit-base-patch32")
    parser.add_argument("--out", required=True, help="new folder")
    parser.set_defaults(run=convert_clip)
