"""Golden cases of diffusers' AutoencoderKL: moments, posterior, scaled latents, decoded images."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dsr_jax.convert.rules import torch_to_flax
from dsr_jax.convert.sdvae import config_from_diffusers, sdvae_rules
from dsr_jax.convert.vae_names import modernize
from dsr_jax.models.vae import AutoencoderKL
from tools.golden.compare import Case, Check
from tools.golden.denoiser import nchw, nhwc


def run_vae(case: Case) -> list[Check]:
    """Compares encoder, posterior with recorded noise, and decoder."""
    config, io = config_from_diffusers(case.config["params"]), case.io
    params = torch_to_flax(modernize(case.weights())[0], sdvae_rules(config))
    network, scale = AutoencoderKL(config), case.config["scale"]
    posterior, kept = jax.jit(
        lambda images: network.apply(
            {"params": params}, images, method="encode", mutable=["intermediates"]
        )
    )(jnp.asarray(nhwc(io["x"])))
    latents = posterior.sample(nhwc(io["eps"])) * scale
    decoded = jax.jit(
        lambda latents: network.apply({"params": params}, latents / scale, method="decode")
    )(latents)
    found = {
        **{name: kept["intermediates"][name][0] for name in ("encoder_out", "moments")},
        "mean": posterior.mean,
        "logvar": posterior.log_variance,
        "std": posterior.std,
        "z_scaled": latents,
        "decoded": decoded,
    }
    return [Check(name, nchw(got), io[name], "forward") for name, got in found.items()]


def _is_vae(config: Mapping[str, Any]) -> bool:
    return "AutoencoderKL" in str(config.get("module", "")) and "scale" in config


RUNNERS = {"denoiser_sdvae*": (run_vae, _is_vae)}
