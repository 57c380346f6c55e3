"""Golden cases of training RAE's decoder: discriminator, LPIPS, augmentation, one step."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax.convert.decoder import decoder_rules
from dsr_jax.convert.discriminator import (
    backbone_rules,
    heads_rules,
    heads_to_flax,
    infer_backbone,
    split_qkv,
)
from dsr_jax.convert.lpips import infer_lpips, lpips_rules, take_lpips
from dsr_jax.convert.rules import flax_to_torch, torch_to_flax
from dsr_jax.core.typing import Array, Params, PyTree
from dsr_jax.models.decoder import ViTDecoder
from dsr_jax.models.discriminator import SPECTRAL, Discriminator, Heads
from dsr_jax.models.lpips import LPIPS
from dsr_jax.models.vit import ViT
from dsr_jax.training.adversarial import (
    accuracy,
    discriminator_loss,
    generator_loss,
    quantize,
    to_signed,
)
from dsr_jax.training.decoder_state import DecoderState, DiscriminatorState
from dsr_jax.training.decoder_step import (
    LossSettings,
    Networks,
    discriminator_loss_and_grads,
    generator_terms_and_grads,
)
from dsr_jax.training.diffaug import augment
from dsr_jax.training.optimizers import LearningRate, Optimizer
from dsr_jax.training.step import apply_gradients
from tools.golden.compare import Case, Check, checks_of
from tools.golden.denoiser import nchw, nhwc
from tools.golden.rae import load_decoder


def below(state: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Returns the tensors whose names begin with `prefix`, which is removed."""
    return {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}


def load_discriminator(
    state: Mapping[str, np.ndarray], recipe: Mapping[str, Any], kernel_size: int
) -> tuple[Discriminator, Params, Params, PyTree]:
    """Returns a case's discriminator: network, backbone, heads, singular vectors."""
    dino = below(state, "dino.")
    config = infer_backbone(dino, recipe["num_heads"])
    config = dataclasses.replace(config, layer_norm_eps=recipe.get("norm_eps", 1e-6))
    network = Discriminator(ViT(config), tuple(recipe["key_depths"]), Heads(kernel_size))
    backbone = torch_to_flax(split_qkv(dino), backbone_rules(config))
    return network, backbone, *heads_to_flax(network, below(state, "disc."))


def load_lpips(state: Mapping[str, np.ndarray]) -> tuple[LPIPS, Params]:
    """Returns a case's LPIPS network and its parameters."""
    state = take_lpips(state)
    network = infer_lpips(state)
    return network, torch_to_flax(state, lpips_rules(network.channels))


def run_discriminator(case: Case) -> list[Check]:
    """Compares features, logits, losses, gradients and updated singular vectors."""
    config, io = case.config, case.io
    network, *arrays = load_discriminator(case.weights(), config["recipe"], config["ks"])
    backbone, heads, spectral = arrays
    real, fake = (jnp.asarray(nhwc(io[key])) for key in ("real", "fake"))
    discriminate: Any = jax.jit(network, static_argnames="train")
    loss, gradient = jax.jit(
        jax.value_and_grad(lambda x: generator_loss(network(*arrays, x, train=False)[0]))
    )(fake)
    quantized = quantize(fake)
    discriminator = DiscriminatorState(
        step=jnp.zeros((), jnp.int32), params=heads, spectral=spectral, opt_state=()
    )
    terms, grads = jax.jit(
        functools.partial(discriminator_loss_and_grads, network, LossSettings())
    )(backbone, discriminator, real, quantized)
    on_fake, between = discriminate(backbone, heads, spectral, quantized, train=True)
    on_real, _ = discriminate(backbone, heads, between, real, train=True)
    found = {
        "eval_logits_fake": discriminate(backbone, heads, spectral, fake, train=False)[0],
        "gen_loss": loss,
        "gen_loss_grad_fake": nchw(gradient),
        "dino_activations": jax.jit(network.features)(backbone, fake).swapaxes(2, 3),
        "fake_quantised": nchw(quantized),
        "train_logits_fake": on_fake,
        "train_logits_real": on_real,
        "hinge_d_loss": terms.loss,
        "vanilla_d_loss": discriminator_loss("vanilla", on_real, on_fake),
        "accuracy": accuracy(on_real, on_fake),
        "eval_logits_real_after": discriminate(backbone, heads, terms.spectral, real, train=False)[
            0
        ],
    }
    # One tree holds both: the table converts parameters and singular vectors together.
    state = flax_to_torch({"params": grads, SPECTRAL: terms.spectral}, heads_rules(network))
    for name, array in state.items():
        prefix = "buffer_after" if name.endswith(("weight_u", "weight_v")) else "grad"
        found[f"{prefix}/{name}"] = array
    found, wanted = _with_kernels(found), _with_kernels(io)
    gradients = {key: x for key, x in found.items() if "grad" in key}
    others = {key: x for key, x in found.items() if key not in gradients}
    return [
        *checks_of(gradients, wanted, "gradient"),
        *checks_of(others, wanted, "encoder", axes={"dino_activations": -2}),
    ]


def _with_kernels(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Appends the gradient of each bias before a norm to that of its kernel.

    The norm takes the bias away again, so that this gradient is zero but for rounding, of which
    no digit can agree; beside the kernel's gradient it must still be negligible.
    """
    joined = dict(arrays)
    for name in arrays:
        if re.fullmatch(r"grad/heads\.\d+\.(0|1\.fn)\.0\.bias", name):
            kernel = name.replace("bias", "weight_orig")
            joined[kernel] = np.append(arrays[kernel], joined.pop(name))
    return joined


def run_lpips(case: Case) -> list[Check]:
    """Compares distances, their mean, and its gradient."""
    io = case.io
    network, params = load_lpips(case.weights())
    given, target = (jnp.asarray(nhwc(io[key])) for key in ("input", "target"))

    def mean(target: Array) -> tuple[Array, Array]:
        each: Any = network.apply({"params": params}, given, target)
        return jnp.mean(each), each

    (average, each), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(target)
    return [
        Check("none", each[:, None, None, None], io["none"], "encoder"),
        Check("mean", average, io["mean"], "encoder"),
        Check("grad_target", nchw(gradient), io["grad_target"], "gradient"),
    ]


def run_augmentation(case: Case) -> list[Check]:
    """Augmented images, without and with holes; the share stands in the array's name."""
    images, uniforms = jnp.asarray(nhwc(case.io["x"])), jnp.asarray(case.io["rand01"].T)
    checks = []
    for key, want in case.io.items():
        if found := re.fullmatch(r"cutout(\d)(\d*)_out", key):
            share = float(f"{found[1]}.{found[2] or 0}")
            checks.append(Check(key, nchw(augment(images, uniforms, share)), want, "encoder"))
    return checks


def run_schedules(case: Case) -> list[Check]:
    """Compares the learning rate at every step of each schedule."""
    checks = []
    for number, table in enumerate(case.config["schedules"]):
        settings, per_epoch = table["scheduler"], table.get("steps_per_epoch")
        rate = LearningRate(
            settings["base_lr"],
            settings["type"],
            settings.get("final_lr", settings["base_lr"]),
            warmup_steps=_in_steps(settings, "warmup_steps", "warmup_epochs", per_epoch),
            decay_end_steps=_in_steps(settings, "decay_end_steps", "decay_end_epoch", per_epoch),
            warmup_from_zero=settings.get("warmup_from_zero", False),
        )
        want = case.io[f"lr_{number}"]
        checks.append(Check(f"lr_{number}", jax.vmap(rate)(jnp.arange(len(want))), want, "encoder"))
    return checks


def _in_steps(settings: Mapping[str, Any], steps: str, epochs: str, per_epoch: int | None) -> int:
    """Returns a time of a schedule, which the original takes in steps or else in epochs.

    Raises:
      ValueError: If it is given in neither, or in epochs of unknown length.
    """
    if steps in settings:
        return int(settings[steps])
    if epochs not in settings or per_epoch is None:
        raise ValueError(f"neither {steps} nor {epochs} with steps_per_epoch in {dict(settings)}")
    return int(settings[epochs] * per_epoch)


def step_settings(config: Mapping[str, Any]) -> tuple[LossSettings, Optimizer]:
    """Returns loss settings and optimizer of a case."""
    loss, optim, schedule = config["loss"], config["optim"], config["sched"]
    rate = LearningRate(
        optim["lr"],
        schedule.get("type", "cosine"),
        schedule["final_lr"],
        warmup_steps=schedule["warmup_steps"],
        decay_end_steps=schedule["decay_end_steps"],
        warmup_from_zero=schedule["warmup_from_zero"],
    )
    b1, b2 = optim["betas"]
    settings = LossSettings(loss["perceptual_weight"], loss["disc_weight"], loss["max_d_weight"])
    optimizer = Optimizer(rate, b1, b2, optim["eps"], weight_decay=optim["weight_decay"])
    return settings, optimizer


def run_step(case: Case) -> list[Check]:
    """Compares one decoder update with LPIPS and the discriminator: losses to EMA weights."""
    config, io, weights = case.config, case.io, case.weights()
    sizes, params = load_decoder(below(weights, "decoder."), config["decoder"])
    _, average = load_decoder(below(weights, "ema_before."), config["decoder"])
    lpips, lpips_params = load_lpips(below(weights, "lpips."))
    disc = config["disc"]
    discriminate, *arrays = load_discriminator(weights, disc["recipe"], disc["ks"])
    settings, optimizer = step_settings(config)
    mean, std = (np.array(config[f"image_{name}"], np.float32) for name in ("mean", "std"))
    latents, images = jnp.asarray(io["latent_tokens"]), jnp.asarray(nhwc(io["images"]))
    uniforms = jnp.asarray(io["diffaug_rand01"].T)
    networks = Networks(
        encode=lambda variables, images, keys: latents,
        decode=lambda variables, p, z: ViTDecoder(sizes).apply({"params": p}, z).image * std + mean,
        perceptual=lambda variables, a, b: lpips.apply({"params": lpips_params}, a, b),
        discriminate=discriminate,
    )
    start, decay = jnp.zeros((), jnp.int32), str(config["ema_decay"])
    discriminator = DiscriminatorState(
        step=start, params=arrays[1], spectral=arrays[2], opt_state=()
    )
    state = DecoderState(
        step=start,
        params=params,
        ema={decay: average},
        opt_state=optimizer.init(params),
        discriminator=discriminator,
    )

    @jax.jit
    def step(state: DecoderState) -> Any:
        terms, grads = generator_terms_and_grads(
            networks, settings, arrays[0], state, images, latents, uniforms, True
        )
        return terms, grads, apply_gradients(state, grads, optimizer)

    terms, grads, after = step(state)
    augmented = augment(to_signed(terms.images), uniforms)
    found = {
        "recon": nchw(terms.images),
        "l1": terms.l1,
        "lpips": terms.perceptual,
        "recon_total": terms.l1 + settings.perceptual_weight * terms.perceptual,
        "fake_aug": nchw(augmented),
        "logits_fake": discriminate(*arrays, augmented, train=False)[0],
        "gan_loss": terms.gan,
        "adaptive_weight": terms.weight,
        "total_loss": terms.total,
        "lr_used": optimizer.learning_rate(state.step),
        "lr_next": optimizer.learning_rate(after.step),
    }
    trees = {"grad": grads, "updated": after.params, "ema_updated": after.ema[decay]}
    for prefix, tree in trees.items():
        names = flax_to_torch(tree, decoder_rules(sizes))
        found |= {f"{prefix}/{name}": array for name, array in names.items()}
    gradients = {key: array for key, array in found.items() if key.startswith("grad/")}
    others = {key: array for key, array in found.items() if key not in gradients}
    return [
        *checks_of(gradients, io, "gradient", optional=("grad/*",)),
        *checks_of(others, io, "encoder", optional=("updated/*", "ema_updated/*")),
    ]


def _is_discriminator(config: Mapping[str, Any]) -> bool:
    plain = str(config.get("norm_type", "bn")).startswith("bn")
    return "recipe" in config and plain and config.get("using_spec_norm", True)


RUNNERS = {
    "encoder_discriminator*": (run_discriminator, _is_discriminator),
    "encoder_lpips*": (run_lpips, lambda config: "channels" in config),
    "encoder_diffaug*": (run_augmentation, lambda config: config.get("prob") == 1),
    "encoder_lr_schedule*": (run_schedules, lambda config: "schedules" in config),
    "encoder_stage1_step*": (run_step, lambda config: {"decoder", "disc", "loss"} <= set(config)),
}
