"""Golden cases of the representation autoencoder: decoder, whole, statistics, metrics."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsr_jax.convert.decoder import decoder_rules, infer_decoder, take_decoder
from dsr_jax.convert.rules import torch_to_flax
from dsr_jax.core.typing import Params
from dsr_jax.models.decoder import DecoderConfig, ViTDecoder
from dsr_jax.models.embeddings import sincos_2d
from tools.golden.compare import Case, Check
from tools.golden.denoiser import nchw


def load_decoder(
    state: Mapping[str, np.ndarray], sizes: Mapping[str, Any]
) -> tuple[DecoderConfig, Params]:
    """A case's decoder."""
    state = take_decoder(state)
    config = dataclasses.replace(
        infer_decoder(state, sizes["decoder_num_attention_heads"]),
        layer_norm_eps=sizes["layer_norm_eps"],
    )
    return config, torch_to_flax(state, decoder_rules(config))


def run_decoder(case: Case) -> list[Check]:
    """Logits, image, every block; another grid; a class token among the latents."""
    config, params = load_decoder(case.weights(), case.config["config"])
    io = case.io
    found: dict[str, Any] = {}
    for suffix, source, drop in (
        ("", "latent_tokens", False),
        ("_other_grid", "latent_tokens_other_grid", False),
        ("_drop_cls", "latent_tokens_with_cls", True),
    ):
        if source not in io:
            continue
        out, kept = ViTDecoder(config).apply(
            {"params": params}, jnp.asarray(io[source]), drop, mutable=["intermediates"]
        )
        kept = kept["intermediates"]
        states = [kept["embeddings"][0][None], kept["blocks"]["block_out"][0]]
        found |= {
            f"logits{suffix}": out.logits,
            f"image{suffix}": nchw(out.image),
            f"hidden_states{suffix}": jnp.concatenate(states),
        }
    table = sincos_2d(config.hidden_size, config.grid)
    found["pos_embed_sincos_init"] = np.pad(table, ((1, 0), (0, 0)))[None]
    return [Check(key, array, io[key], "encoder") for key, array in found.items() if key in io]


RUNNERS = {
    "encoder_vit_decoder*": (run_decoder, lambda config: config.get("cls") == "GeneralDecoder"),
}
