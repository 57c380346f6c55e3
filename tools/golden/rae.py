"""Golden cases of the representation autoencoder: decoder, round trip, statistics, metrics."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsr_jax.convert.decoder import decoder_rules, infer_decoder, take_decoder
from dsr_jax.convert.encoders import config_from_hub, encoder_rules, take_encoder
from dsr_jax.convert.rules import torch_to_flax
from dsr_jax.convert.statistics import load_statistics
from dsr_jax.core.typing import Params
from dsr_jax.evaluation.reconstruction import psnr, ssim
from dsr_jax.models.decoder import DecoderConfig, ViTDecoder
from dsr_jax.models.embeddings import sincos_2d
from dsr_jax.models.intervention import Intervention
from dsr_jax.models.vit import ViT
from dsr_jax.registers.neurons import neurons_to_mask
from dsr_jax.sampling.images import to_uint8
from dsr_jax.spaces.rae import RAE, Noise
from dsr_jax.spaces.statistics import LatentStatistics
from tools.golden.compare import Case, Check, checks_of
from tools.golden.denoiser import nchw, nhwc
from tools.golden.encoder import MODEL_TYPES


def load_decoder(
    state: Mapping[str, np.ndarray], sizes: Mapping[str, Any]
) -> tuple[DecoderConfig, Params]:
    """Returns a case's decoder and its parameters."""
    state = take_decoder(state)
    config = dataclasses.replace(
        infer_decoder(state, sizes["decoder_num_attention_heads"]),
        layer_norm_eps=sizes["layer_norm_eps"],
    )
    return config, torch_to_flax(state, decoder_rules(config))


def run_decoder(case: Case) -> list[Check]:
    """Compares logits, image and all blocks; also with another grid and with a class token."""
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
    return checks_of(
        found,
        io,
        "encoder",
        optional=("hidden_states_*", "image_drop_cls"),
        axes={key: -1 for key in found if key.startswith("hidden_states")},
    )


NOISES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "norm_scaled": {"norm_scaled_noise": True},
    "post_stat": {"post_stat_norm": True},
    "post_stat_norm_scaled": {"post_stat_norm": True, "norm_scaled_noise": True},
    "preln_norm_scaled_tau2": {"preln": True, "norm_scaled_noise": True, "noise_tau": 2.0},
}
"""Fields of RAE by the cases' names of noise."""


def load_rae(case: Case) -> tuple[RAE, dict[str, Any], dict[str, Any]]:
    """Returns a case's autoencoder, and its variables without and with statistics."""
    settings = case.config["rae"]
    kind = MODEL_TYPES[settings["encoder_cls"]]
    sizes = case.config["encoder_hf_config"]
    record = {"vision_config": sizes} if kind == "siglip" else sizes
    config = dataclasses.replace(
        config_from_hub({**record, "model_type": kind}),
        pixel_mean=tuple(settings["image_mean"]),
        pixel_std=tuple(settings["image_std"]),
    )
    state = case.weights()
    encoder = torch_to_flax(take_encoder(state, config.family), encoder_rules(config))
    decoder_config, decoder = load_decoder(state, case.config["decoder"])
    space = RAE(
        ViT(config),
        ViTDecoder(decoder_config),
        image_size=settings["encoder_input_size"],
        noise_tau=settings["noise_tau"],
        eps=settings["eps"],
    )
    registers = None
    if "neurons" in settings:
        neurons = {int(block): units for block, units in settings["neurons"].items()}
        mask = neurons_to_mask(neurons, config.depth, config.mlp_dim)
        registers = Intervention(mask=mask)
    statistics = {"mean": nhwc(case.io["latent_mean"]), "var": nhwc(case.io["latent_var"])}
    return (
        space,
        space.make_variables(encoder, decoder, registers=registers),
        space.make_variables(encoder, decoder, statistics, registers),
    )


def run_roundtrip(case: Case) -> list[Check]:
    """Compares latents, norms and images, with and without statistics, and with recorded noise."""
    space, plain, normed = load_rae(case)
    io = case.io
    images = jnp.asarray(nhwc(io["images"]))
    raw, raw_norms = space.encode_with_norms(plain, images)
    latents, norms = space.encode_with_norms(normed, images)
    decoded = space.decode(normed, latents)
    before_norm = dataclasses.replace(space, preln=True)
    pre, pre_norms = before_norm.encode_with_norms(normed, images)
    checks = [
        Check(key, array, io[key], "encoder")
        for key, array in {
            "resized_normalised_input": nchw(space.normalize_images(images)),
            "z_raw": nchw(raw),
            "token_norm_raw": raw_norms[:, None],
            "recon_raw": nchw(space.decode(plain, raw)),
        }.items()
    ]
    found = {
        "z": nchw(latents),
        "token_norm": norms[:, None],
        "recon": nchw(decoded),
        "recon_unclamped_range": jnp.stack([decoded.min(), decoded.max()]),
        "preln_z": nchw(pre),
        "preln_token_norm": pre_norms[:, None],
    }
    for name, fields in NOISES.items():
        key = f"noise_{name}"
        if f"{key}_z" in io:
            noisy = dataclasses.replace(space, **fields)
            noise = Noise(io[f"{key}_u"].reshape(-1), _grid(io[f"{key}_n"], space.latent_shape))
            z, z_norms = noisy.encode_noised(normed, images, noise)
            found |= {f"{key}_z": nchw(z), f"{key}_token_norm": z_norms[:, None]}
    checks += checks_of(found, io, "roundtrip", optional=("preln_*", "noise_*_token_norm"))
    return [*checks, *_bytes(io, decoded), *_statistics_file(case)]


def _grid(noise: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns recorded noise of tokens [B, T, C] or latents [B, C, h, w] as [B, h, w, C]."""
    return nhwc(noise) if noise.ndim == 4 else noise.reshape(-1, *shape)


def _bytes(io: Mapping[str, np.ndarray], decoded: Any) -> list[Check]:
    """Compares the cast exactly, and the bytes of our image up to one level of rounding."""
    want = io["recon_uint8"]
    return [
        Check("recon_uint8 of recon", to_uint8(nhwc(io["recon"])), want, "exact"),
        Check("recon_uint8", to_uint8(decoded), want, "levels"),
    ]


def _statistics_file(case: Case) -> list[Check]:
    """Compares the official statistics file, as our converter reads it."""
    statistics = load_statistics(case.path / "stats.pt")
    return [
        Check(f"stats.pt {name}", nchw(statistics[name]), case.io[f"latent_{name}"], "exact")
        for name in ("mean", "var")
    ]


def run_statistics(case: Case) -> list[Check]:
    """Compares statistics of batches, per position and per channel, and the file of the former."""
    io = case.io
    batches = [io[key] for key in sorted(io) if key.startswith("batch")]
    whole = LatentStatistics(nhwc(batches[0]).shape[1:])
    channels = LatentStatistics(batches[0].shape[1:2])
    for batch in batches:
        whole.update(nhwc(batch))
        channels.update(nhwc(batch).reshape(-1, batch.shape[1]))
    found, flat = whole.finish(), channels.finish()
    checks = [Check("count", whole.count, io["count"], "exact")]
    file = load_statistics(case.path / "normalization_stats.pt")
    for name in ("mean", "var"):
        checks += [
            Check(name, nchw(found[name]), io[name], "encoder"),
            Check(f"{name}_3d", flat[name], io[f"{name}_3d"], "encoder"),
            Check(f"normalization_stats.pt {name}", nchw(file[name]), io[name], "exact"),
        ]
    return checks


def run_metrics(case: Case) -> list[Check]:
    """Compares PSNR and SSIM of each pair, and their means."""
    io = case.io
    checks = []
    for name, metric in (("psnr", psnr), ("ssim", ssim)):
        values = metric(io["ref"], io["rec"])
        checks.append(Check(f"{name}_per_image", values, io[f"{name}_per_image"], "encoder"))
        checks.append(Check(name, values.mean(), io[name], "encoder"))
    return checks


def _is_roundtrip(config: Mapping[str, Any]) -> bool:
    return config.get("rae", {}).get("encoder_cls") in MODEL_TYPES


RUNNERS = {
    "encoder_vit_decoder*": (run_decoder, lambda config: config.get("cls") == "GeneralDecoder"),
    "encoder_rae_roundtrip*": (run_roundtrip, _is_roundtrip),
    "encoder_latent_stats*": (run_statistics, lambda config: True),
    "encoder_recon_metrics*": (run_metrics, lambda config: True),
}
