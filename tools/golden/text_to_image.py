"""Golden cases of text-to-image: language model, per-token conditions, joint objective."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.build.text_to_image import make_text_model
from dsr_jax.convert.qwen2 import model_of_config, qwen2_rules
from dsr_jax.convert.rules import RuleSet, flax_to_torch, shapes_of, torch_to_flax
from dsr_jax.convert.scale_rae import denoiser_rules, scale_rae_rules
from dsr_jax.core.prompts import IGNORED
from dsr_jax.diffusion import guidance
from dsr_jax.diffusion.objectives import make_objective
from dsr_jax.diffusion.samplers import released_grid, sample_ode, sample_released
from dsr_jax.diffusion.time_sampling import shift_time
from dsr_jax.models.conditioning import FOURIER_SEED, TextCondition, drop_text
from dsr_jax.models.dit import LightningDiT
from dsr_jax.models.dit_dh import DiTDH
from dsr_jax.models.embeddings import FourierTimeEmbed, torch_normal
from dsr_jax.models.text_to_image import TextToImage
from dsr_jax.models.transformer import DiffusionTransformer
from dsr_jax.training.language_loss import language_loss
from dsr_jax.training.step import RandomInputs
from dsr_jax.training.text_step import JointLosses, joint_losses, total_loss
from tools.golden.compare import Case, Check
from tools.golden.denoiser import nchw, nhwc


def run_language_model(case: Case) -> list[Check]:
    """Compares embeddings, all blocks, hidden states, logits and loss, padded and unpadded."""
    io, state = case.io, case.weights()
    model = model_of_config(case.config, state)
    params = {"params": torch_to_flax(state, qwen2_rules(model))}
    tokens, targets = (jnp.asarray(io[key], jnp.int32) for key in ("input_ids", "labels"))
    valid = np.asarray(io["attention_mask"], bool)
    embeds = model.apply(params, tokens, method="embeddings")

    @jax.jit
    def decode(embeds: jax.Array) -> tuple[jax.Array, Any]:
        hidden, kept = model.apply(params, embeds, method="decode", mutable=["intermediates"])
        return hidden, kept["intermediates"]["layers"]["block_out"][0]

    hidden, blocks = decode(embeds)
    logits = model.apply(params, hidden, method="logits")
    loss = language_loss(
        lambda rows: model.apply(params, rows, method="logits"), hidden, targets, 0
    )
    checks = [
        Check("embeds", embeds, io["embeds"], "forward"),
        Check("layer_outputs_causal", blocks, io["layer_outputs_causal"], "forward", axis=-1),
        Check("last_hidden_causal", hidden, io["last_hidden_causal"], "forward"),
        Check("logits_causal", logits, io["logits_causal"], "forward"),
        Check(
            "lm_loss_shifted_mean",
            loss.total.sum() / loss.tokens.sum(),
            io["lm_loss_shifted_mean"],
            "loss",
        ),
    ]
    for key, got in (("last_hidden", hidden), ("logits", logits)):
        want = io[f"{key}_masked_valid"]
        # What is computed at the padding itself has no meaning.
        chosen = np.where(valid[..., None], np.asarray(got), want)
        checks.append(Check(f"{key}_masked_valid", chosen, want, "forward"))
    return checks


def text_denoiser(config: Mapping[str, Any]) -> DiffusionTransformer:
    """Builds the denoiser from Scale-RAE's settings."""
    widths, depths, heads = (
        np.atleast_1d(config[f"model_{key}"]).tolist() for key in ("hidden_size", "depth", "heads")
    )
    shared: dict[str, Any] = {
        "input_size": math.isqrt(config["diffusion_tokens"]),
        "in_channels": config["diffusion_channels"],
        "num_classes": 0,
        "hidden_size": widths[0],
        "depth": depths[0],
        "num_heads": heads[0],
        "condition_width": config["z_channels"],
        "condition_silu": config["cond_silu"],
    }
    if len(widths) == 1:
        return LightningDiT(**shared)
    return DiTDH(
        **shared,
        decoder_hidden_size=widths[1],
        decoder_depth=depths[1],
        decoder_num_heads=heads[1],
    )


def _read_denoiser(case: Case) -> tuple[DiffusionTransformer, Any]:
    model = text_denoiser(case.config)
    x = jnp.zeros((1, model.grid, model.grid, model.in_channels))
    text = TextCondition(jnp.zeros((1, model.grid**2, model.condition_width)), jnp.zeros(1, bool))
    shapes: Any = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), x, jnp.zeros(1), text))
    rules = denoiser_rules(model)
    dropped = ("*_rope.freqs_*",)
    return model, torch_to_flax(
        case.weights(), RuleSet(tuple(rules), shapes_of(shapes["params"]), dropped)
    )


def run_denoiser(case: Case) -> list[Check]:
    """Compares a denoiser with a condition per token: predictions, guidance, loss, samplers."""
    config, io = case.config, case.io
    model, params = _read_denoiser(case)
    rows = jnp.asarray(io["y"])
    text = TextCondition(rows, jnp.zeros(len(rows), bool))
    apply = jax.jit(lambda x, t, text: model.apply({"params": params}, x, t, text))
    x, t, noise = jnp.asarray(nhwc(io["x"])), jnp.asarray(io["t"]), jnp.asarray(nhwc(io["noise"]))
    guide = guidance.classifier_free(
        apply, guidance.strength_in(config["guidance_scale_tested"]), drop_text
    )
    embed = FourierTimeEmbed(model.condition_width, seed=FOURIER_SEED)
    objective = make_objective("linear", "velocity")
    data = jnp.asarray(io["x0_tokens"]).reshape(noise.shape)
    used = jnp.asarray(io["t_used_for_loss"])
    terms = objective.loss(lambda x, t: apply(x, t, text), data, noise, used)
    times = released_grid(config["inference_step"], config["shift_alpha"])

    def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
        return apply(x, t, text)

    released, descending = (
        np.asarray(sample).reshape(io["x0_tokens"].shape)
        for sample in (
            jax.jit(lambda: sample_released(velocity, noise, times))(),
            jax.jit(lambda: sample_ode(velocity, noise, times))(),
        )
    )
    u = jax.nn.sigmoid(jnp.asarray(io["u_normal"]))
    return [
        Check("fourier_W", torch_normal(FOURIER_SEED, 256), io["fourier_W"], "forward"),
        Check("t_emb", embed.apply({"params": params["t_embedder"]}, t), io["t_emb"], "forward"),
        Check("v", nchw(apply(x, t, text)), io["v"], "forward"),
        Check("v_uncond", nchw(apply(x, t, drop_text(text))), io["v_uncond"], "forward"),
        Check("v_guided_expected", nchw(guide(x, t, text)), io["v_guided_expected"], "forward"),
        Check("t_shifted", shift_time(u, config["shift_alpha"]), io["t_shifted"], "forward"),
        Check("x_t", nchw(objective.path.interpolate(data, noise, used)[0]), io["x_t"], "forward"),
        Check("loss_per_sample", terms.loss, io["loss_per_sample"], "loss"),
        Check("grid", times[::-1], io["grid"], "forward"),
        Check("sample_released", released, io["sample_released"], "trajectory"),
        # The released interval switches guidance off.
        Check("sample_released_guided", released, io["sample_released_guided"], "trajectory"),
        Check("sample_descending", descending, io["sample_descending"], "trajectory"),
    ]


def _read_joint(case: Case) -> tuple[TextToImage, RuleSet, Any]:
    """Returns a case's whole model, its rules and its parameters."""
    config, state = case.config, case.weights()
    model = TextToImage(
        input_size=math.isqrt(config["diff_head"]["diffusion_tokens"]),
        in_channels=config["diff_head"]["diffusion_channels"],
        num_classes=0,
        language=model_of_config(config["lm"], state),
        denoiser=text_denoiser(config["diff_head"]),
        understanding=True,
        text_length=case.io["input_ids"].shape[1],
    )
    rules = scale_rae_rules(model)
    return model, rules, torch_to_flax(state, rules)


def run_joint(case: Case) -> list[Check]:
    """Compares query insertion, hidden states, both losses and gradients of their sum."""
    config, io = case.config, case.io
    model, rules, params = _read_joint(case)
    tokens, targets = (jnp.asarray(io[key], jnp.int32) for key in ("input_ids", "labels"))
    noise = jnp.asarray(nhwc(io["noise"]))
    data = jnp.asarray(io["image_features"]).reshape(noise.shape)
    kept = jnp.zeros(len(tokens), bool)
    inputs = RandomInputs(jnp.asarray(io["t"]), noise, kept)
    text_model = make_text_model(model)
    batch = {"tokens": tokens, "targets": targets}
    # What is supervised lies before the padding that the mask marks.
    assert not np.any((io["attention_mask"] == 0) & (io["labels"] != IGNORED))

    def total(params: Any) -> tuple[jax.Array, JointLosses]:
        losses = joint_losses(
            text_model, make_objective("linear", "velocity"), params, batch, data, inputs, 24
        )
        return total_loss(losses, 1.0, config["vision_coef"]), losses

    (loss, losses), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    states = text_model.read(params, tokens, targets, data)
    at_slots = np.stack(
        [
            np.asarray(h)[np.asarray(row) == config["image_placeholder"]]
            for h, row in zip(states.hidden, tokens, strict=True)
        ]
    )
    embeds = model.apply({"params": params}, tokens, targets, data, method="embed")
    head = config["diff_head"]
    shift = math.sqrt(head["diffusion_tokens"] * head["diffusion_channels"] / head["base_dim"])
    times = shift_time(jax.nn.sigmoid(jnp.asarray(io["u_normal"])), shift)
    gradients = flax_to_torch(jax.tree.map(np.asarray, grads), rules)
    diffusion = losses.diffusion @ losses.answers / losses.answers.sum()
    checks = [
        Check("answer_img_mask", losses.answers, io["answer_img_mask"], "exact"),
        Check("t", times, io["t"], "forward"),
        Check("inputs_embeds", embeds, io["inputs_embeds"], "forward"),
        Check("last_hidden", states.hidden, io["last_hidden"], "forward"),
        Check("query_hidden", at_slots, io["query_hidden"], "forward"),
        Check("z", states.rows, io["z"], "forward"),
        Check(
            "lm_loss",
            losses.language.total.sum() / losses.language.tokens.sum(),
            io["lm_loss"],
            "loss",
        ),
        Check(
            "diffusion_loss_per_image",
            losses.diffusion,
            io["diffusion_loss_per_image"],
            "loss",
        ),
        Check("diffusion_loss", diffusion, io["diffusion_loss"], "loss"),
        Check("total", loss, io["total"], "loss"),
    ]
    for name, source in _JOINT_GRADIENTS.items():
        checks.append(Check(name, gradients[source], io[name], "gradient"))
    return checks


_JOINT_GRADIENTS = {
    "grad_latent_queries": "model.latent_queries",
    "grad_projector_weight": "diff_head_projector.weight",
    "grad_mm_projector_0_weight": "model.mm_projector.0.weight",
    "grad_embed_tokens": "model.embed_tokens.weight",
    "grad_dit_block0_qkv": "diff_head.model.dit_blocks.0.attn.qkv.weight",
    "grad_cond_dropout_embedding": "diff_head.model.y_embedder.dropout_embedding",
}


def _is_language_model(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "qwen2"


def _is_denoiser(config: Mapping[str, Any]) -> bool:
    return config.get("backbone") in ("LightningDiT", "LightningDDT")


def _is_joint(config: Mapping[str, Any]) -> bool:
    return "lm" in config and "diff_head" in config


RUNNERS = {
    "t2i_joint*": (run_joint, _is_joint),
    "t2i_qwen2_lm*": (run_language_model, _is_language_model),
    "t2i_dit*": (run_denoiser, _is_denoiser),
    "t2i_ddt*": (run_denoiser, _is_denoiser),
}
