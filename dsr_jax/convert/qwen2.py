"""Qwen2's table of rules, and its sizes from a Hugging Face folder.

Source: transformers modeling_qwen2.py; spec t2i 5.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.convert.denoiser import check_keys
from dsr_jax.convert.rules import LINEAR, Rule, RuleSet, linear, shapes_of, vector
from dsr_jax.core.errors import ConversionError
from dsr_jax.models.depth import Stack
from dsr_jax.models.language import LanguageModel

FAMILY = "qwen2"
"""Name of the command and of the converted folders."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "use_sliding_window": (False,),
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
}
"""Settings of config.json with the values for which the network is the one here."""


def language_rules(model: LanguageModel, prefix: str = "") -> list[Rule]:
    """Returns the rules of a language model, whose parameters lie below `prefix`."""
    stack = (Stack(f"{prefix}layers", 0, model.depth),)
    width, heads, kv_heads = model.hidden_size, model.num_heads, model.num_kv_heads
    head_dim = width // heads
    layer = [
        Rule("input_layernorm.weight", "norm1/scale"),
        Rule("post_attention_layernorm.weight", "norm2/scale"),
        Rule("self_attn.o_proj.weight", "attn/o/kernel", linear(inputs=(heads, head_dim))),
        *(
            Rule(f"mlp.{name}_proj.weight", f"mlp/{name}/kernel", LINEAR)
            for name in ("gate", "up", "down")
        ),
    ]
    for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        source, target, shape = f"self_attn.{name}_proj", f"attn/{name}", (count, head_dim)
        layer.append(Rule(f"{source}.weight", f"{target}/kernel", linear(outputs=shape)))
        layer.append(Rule(f"{source}.bias", f"{target}/bias", vector(*shape)))
    rules = [
        Rule(EMBEDDING, f"{prefix}embed/embedding"),
        Rule("model.norm.weight", f"{prefix}norm/scale"),
    ]
    if not model.tied:
        rules.append(Rule(HEAD, f"{prefix}head/kernel", LINEAR))
    return rules + [
        dataclasses.replace(rule, source="model.layers.{i}." + rule.source, stacks=stack)
        for rule in layer
    ]


def qwen2_rules(model: LanguageModel) -> RuleSet:
    """Returns the rule set of a language model by itself."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    abstract: Any = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens))
    return RuleSet(tuple(language_rules(model)), shapes_of(abstract["params"]))


def model_of_config(
    config: Mapping[str, Any], state: Mapping[str, np.ndarray] | None = None
) -> LanguageModel:
    """Returns the network that a Hugging Face config.json describes.

    Args:
      config: Content of config.json.
      state: The weights, by which rows and heads are checked: a table that was resized after the
        config had been written counts as it is.

    Raises:
      ConversionError: If a setting is missing or asks for what the network here does not do.
    """
    for key, known in _UNSUPPORTED.items():
        value = config.get(key, known[0])
        if value not in known:
            raise ConversionError(
                f"config.json has {key}={value!r}, which is not supported",
                f"use a model with {key}={known[0]!r}",
            )
    kind = (config.get("rope_parameters") or {}).get("rope_type", "default")
    if kind != "default":
        raise ConversionError(
            f"config.json has rope_parameters of rope_type={kind!r}, which is not supported",
            "use a model with rope_type='default'",
        )
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    more = ("num_key_value_heads", "intermediate_size")
    if absent := [key for key in (*needed, *more) if key not in config]:
        raise ConversionError(f"config.json lacks {', '.join(absent)}", "is it a Qwen2 model's?")
    rows = config["vocab_size"]
    if state is not None:
        check_keys(state, "Qwen2", (EMBEDDING,))
        rows = state[EMBEDDING].shape[0]
    return LanguageModel(
        vocab_size=rows,
        hidden_size=config["hidden_size"],
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        mlp_dim=config["intermediate_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        rope_theta=float(_theta(config)),
        epsilon=float(config.get("rms_norm_eps", 1e-6)),
    )


def _theta(config: Mapping[str, Any]) -> float:
    """Returns the base of the rotary frequencies, also where transformers 5 keeps it.

    transformers takes 10000 where none is given: it does not write values that are its defaults.
    """
    nested = config.get("rope_parameters") or {}
    return config.get("rope_theta", nested.get("rope_theta", 10_000.0))


def tie_head(state: Mapping[str, np.ndarray], tied: bool) -> dict[str, np.ndarray]:
    """Returns a state dict without the output table where that is the token table.

    Args:
      state: Arrays by PyTorch name.
      tied: The model's config ties both tables.

    Raises:
      ConversionError: If the config ties two tables that differ.
    """
    if not tied or HEAD not in state:
        return dict(state)
    if not np.array_equal(state[HEAD], state[EMBEDDING]):
        raise ConversionError(
            f"config.json has tie_word_embeddings=true, but {HEAD} differs from {EMBEDDING}",
            "set tie_word_embeddings to false in config.json if the tables are meant to differ",
        )
    return {name: value for name, value in state.items() if name != HEAD}


def resize_vocabulary(params: Mapping[str, Any], rows: int, first_new: int) -> dict[str, Any]:
    """Returns converted parameters with tables of another number of rows.

    Args:
      params: Parameters of a language model, arrays of NumPy.
      rows: Rows of the result.
      first_new: First row that was not trained: it and those behind it become the mean of the rows
        before it.

    Raises:
      ConversionError: If the tables have fewer trained rows than that.
    """
    table = params["embed"]["embedding"]
    if first_new > len(table) or rows < first_new:
        raise ConversionError(
            f"the converted table has {len(table)} rows and the config's {rows}, but the "
            f"tokenizer's own words take {first_new}",
            "use the tokenizer of this language model, or set config.language.vocab_size",
        )

    def resize(table: np.ndarray) -> np.ndarray:
        old = np.asarray(table[:first_new], np.float32)
        new = np.broadcast_to(old.mean(axis=0), (rows - first_new, old.shape[1]))
        return np.concatenate([old, new])

    resized = {**params, "embed": {"embedding": resize(table)}}
    if "head" in params:
        resized["head"] = {"kernel": resize(params["head"]["kernel"].T).T}
    return resized
