"""Encoders of the experiment: a clean one, a copy with outliers, and test-time registers for it."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsr_jax.convert.files import save_converted
from dsr_jax.core.files import write_json
from dsr_jax.core.rng import stream_key
from dsr_jax.core.typing import Array, Params
from dsr_jax.data.sources import make_source
from dsr_jax.models.intervention import Intervention
from dsr_jax.models.vit import ViT, ViTConfig
from dsr_jax.parallel.mesh import MeshShape, make_mesh
from dsr_jax.parallel.processes import log
from dsr_jax.registers.neurons import Neurons, neurons_to_mask, save_neurons
from dsr_jax.registers.planting import plant_register_neurons
from dsr_jax.registers.search import SearchSettings, find_registers
from dsr_jax.registers.streaming import NormalizedImages
from dsr_jax.registers.trace import trace_encoder

ENCODER = ViTConfig(
    family="siglip",
    image_size=16,
    patch_size=4,
    hidden_size=64,
    depth=6,
    num_heads=4,
    mlp_dim=256,
    activation="gelu_tanh",
)
PLANTED = {1: [17, 80], 2: [5, 99, 200], 3: [31]}
CALIBRATION = 256
MASKED = 0.5


class Found(NamedTuple):
    """Result of the search in the encoder with outliers.

    Attributes:
      threshold: Norm above which a token of the last block is an outlier.
      neurons: Units by block.
    """

    threshold: float
    neurons: Neurons


def digits(split: str = "train") -> NormalizedImages:
    """Returns the digits, sized and normalized for the encoder."""
    source = make_source("digits", image_size=ENCODER.image_size, channels=3, split=split)
    return NormalizedImages(source, ENCODER.pixel_mean, ENCODER.pixel_std)


def read_pixels(split: str = "train") -> np.ndarray:
    """Returns all normalized images [N, H, W, 3]."""
    images = digits(split)
    return np.stack([images[i] for i in range(len(images))])


def pretrain(steps: int, batch: int = 128, seed: int = 0) -> Params:
    """Trains the encoder to predict masked patches and returns its parameters.

    Half the patches are replaced by the mean color; a linear layer predicts their pixels from the
    encoder's tokens.

    Source: Xie et al. 2022, "SimMIM", the simplest form of masked autoencoding.
    """
    model, pixels = ViT(ENCODER), jnp.asarray(read_pixels())
    head = nn.Dense(ENCODER.patch_size**2 * 3)
    init = jax.random.split(stream_key(seed, "masked_init"))
    tokens = jnp.zeros((1, 1, ENCODER.hidden_size))
    params = nn.unbox(
        {
            "encoder": model.init(init[0], pixels[:1])["params"],
            "head": head.init(init[1], tokens)["params"],
        }
    )
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-3, steps), weight_decay=0.05)

    def loss(params: Any, step: Array) -> Array:
        rows, masks = jax.random.split(stream_key(seed, "masked_batch", step))
        images = pixels[jax.random.randint(rows, (batch,), 0, len(pixels))]
        target = _patches(images)
        masked = jax.random.bernoulli(masks, MASKED, target.shape[:2])
        hidden = _unpatch(jnp.where(masked[..., None], 0.0, target))
        out: Any = model.apply({"params": params["encoder"]}, hidden)
        error = jnp.square(head.apply({"params": params["head"]}, out.tokens) - target)
        return jnp.sum(jnp.mean(error, -1) * masked) / jnp.sum(masked)

    @jax.jit
    def update(params: Any, state: Any, step: Array) -> tuple[Any, Any, Array]:
        value, grads = jax.value_and_grad(loss)(params, step)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    for step in range(steps):
        params, state, value = update(params, state, jnp.asarray(step))
        if (step + 1) % 200 == 0 or step + 1 == steps:
            log(f"masked autoencoding: step {step + 1}/{steps}, loss {float(value):.4f}")
    return jax.device_get(params["encoder"])


def _patches(images: Array) -> Array:
    """Cuts [B, H, W, 3] into [B, T, P*P*3]."""
    side, patch = images.shape[1] // ENCODER.patch_size, ENCODER.patch_size
    cut = images.reshape(len(images), side, patch, side, patch, 3).swapaxes(2, 3)
    return cut.reshape(len(images), side * side, -1)


def _unpatch(patches: Array) -> Array:
    """Reassembles images [B, H, W, 3] from the result of `_patches`."""
    side, patch = ENCODER.image_size // ENCODER.patch_size, ENCODER.patch_size
    cut = patches.reshape(len(patches), side, side, patch, patch, 3).swapaxes(2, 3)
    return cut.reshape(len(patches), side * patch, side * patch, 3)


def plant(params: Params) -> Params:
    """Returns a copy of the encoder's parameters with which a few patches become outliers."""
    return plant_register_neurons(
        ViT(ENCODER), params, read_pixels()[:CALIBRATION], PLANTED, fraction=(0.04, 0.1)
    ).params


def cure(params: Params, file: Path) -> Found:
    """Searches the encoder for its register neurons and writes them to `file`."""
    count = sum(map(len, PLANTED.values()))
    mesh, settings = make_mesh(MeshShape()), SearchSettings(top_k=(count,))
    result = find_registers(ViT(ENCODER), params, digits(), settings, mesh, batch=64, log=log)
    save_neurons(file, result.neurons)
    planted = {(block, unit) for block, units in PLANTED.items() for unit in units}
    found = {(block, unit) for block, units in result.neurons.items() for unit in units}
    record = {
        "threshold": result.rounds[0].threshold,
        "found": len(found),
        "planted": len(planted),
        "both": len(found & planted),
        "ended": result.ended,
    }
    write_json(file.with_name("search.json"), record)
    return Found(result.rounds[0].threshold, result.neurons)


def intervention(neurons: Neurons) -> Intervention:
    """Returns test-time registers with the published settings."""
    return Intervention(mask=neurons_to_mask(neurons, ENCODER.depth, ENCODER.mlp_dim))


def save(folder: Path, params: Params, source: str) -> None:
    """Writes an encoder as a converted folder, for `config.space.encoder`."""
    record = {"family": "siglip2", "model": dataclasses.asdict(ENCODER), "source": source}
    save_converted(folder, params, record)


def compare(
    clean: Params, outlier: Params, found: Found, images: int = 360
) -> dict[str, dict[str, float]]:
    """Measures outliers, and how similar the final tokens are to the clean encoder's.

    Returns:
      By encoder: "outlier_share", the fraction of outlier tokens; "normal_cosine", the mean cosine
      similarity with the clean encoder's tokens over patches that are not outliers in the encoder
      with outliers; and "outlier_cosine", the same over patches that are.
    """
    model, pixels = ViT(ENCODER), jnp.asarray(read_pixels("heldout")[:images])
    cases = {
        "clean": (clean, None),
        "outlier": (outlier, None),
        "cured": (outlier, intervention(found.neurons)),
    }
    patches = (ENCODER.image_size // ENCODER.patch_size) ** 2
    traces = {
        name: trace_encoder(model, params, pixels, registers)
        for name, (params, registers) in cases.items()
    }
    norms = {
        name: np.linalg.norm(np.asarray(trace.outputs[-1])[:, :patches], axis=-1)
        for name, trace in traces.items()
    }
    large = norms["outlier"] >= found.threshold
    want = np.asarray(traces["clean"].tokens)
    rows = {}
    for name, trace in traces.items():
        got = np.asarray(trace.tokens)
        length = np.linalg.norm(got, axis=-1) * np.linalg.norm(want, axis=-1)
        cosine = np.sum(got * want, axis=-1) / length
        rows[name] = {
            "outlier_share": float(np.mean(norms[name] >= found.threshold)),
            "normal_cosine": float(cosine[~large].mean()),
            "outlier_cosine": float(cosine[large].mean()),
        }
    return rows
