"""Frozen parts of the experiment: encoders, their decoders, statistics and register neurons."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dsr_jax import build, encode, train_decoder
from dsr_jax import config as configs
from dsr_jax.convert.hub import load_encoder
from dsr_jax.core.files import read_json, write_json
from dsr_jax.data.sources import read_all
from dsr_jax.parallel.processes import log
from dsr_jax.registers.neurons import load_neurons
from dsr_jax.registers.outliers import split_norms
from tools.claims import encoders

CONFIGS = Path(__file__).parents[2] / "configs"
VARIANTS = ("clean", "outlier", "cured")


class Sizes(NamedTuple):
    """Training lengths; `QUICK` is only for trying whether the experiment runs.

    Attributes:
      masked_steps: Training steps of the encoder.
      decoder_steps: Training steps of each decoder.
      steps: Training steps of each denoiser.
      samples: Number of images sampled from each denoiser.
    """

    masked_steps: int = 2_000
    decoder_steps: int = 500
    steps: int = 1_000
    samples: int = 500


QUICK = Sizes(masked_steps=300, decoder_steps=4, steps=4, samples=40)


def config_of(registers: int = 0) -> str:
    """Returns the --config argument of a denoiser; `space_of` has the keys of its space."""
    return f"{CONFIGS / 'digits_rae.py'}:registers={registers}"


def space_of(stages: Path, variant: str, decoded: bool = True) -> list[str]:
    """Returns the config overrides that name the frozen networks of one variant.

    Args:
      stages: Folder of the networks.
      variant: Name in VARIANTS.
      decoded: Whether to include decoder and statistics.
    """
    encoder = "clean" if variant == "clean" else "outlier"
    keys: dict[str, Any] = {
        "encoder": stages / f"encoder_{encoder}",
        "neurons": stages / "neurons.json" if variant == "cured" else "",
        "image_size": encoders.ENCODER.image_size,
    }
    if decoded:
        keys["decoder"] = stages / f"decoder_{variant}"
        keys["statistics"] = stages / f"statistics_{variant}"
    return [f"--config.space.{key}={value}" for key, value in keys.items()]


def make_stages(stages: Path, sizes: Sizes) -> dict[str, Any]:
    """Creates the parts that do not exist yet and returns the encoders' measurements."""
    stages.mkdir(parents=True, exist_ok=True)
    clean, outlier = stages / "encoder_clean", stages / "encoder_outlier"
    if not clean.exists():
        encoders.save(clean, encoders.pretrain(sizes.masked_steps), "masked autoencoding")
    if not outlier.exists():
        planted = encoders.plant(load_encoder(str(clean))[1])
        encoders.save(outlier, planted, "planted register neurons")
    neurons = stages / "neurons.json"
    if not (stages / "search.json").exists():
        encoders.cure(load_encoder(str(outlier))[1], neurons)
    for variant in VARIANTS:
        _train_decoder(stages, variant, sizes.decoder_steps)
        _take_statistics(stages, variant)
    path = stages / "encoders.json"
    if not path.exists():
        search = read_json(stages / "search.json")
        found = encoders.Found(search["threshold"], load_neurons(str(neurons)))
        params = (load_encoder(str(folder))[1] for folder in (clean, outlier))
        limit = latent_norm_limit(stages, found.threshold)
        write_json(path, {"encoders": encoders.compare(*params, found), "limit": limit, **search})
    return read_json(path)


def latent_norm_limit(stages: Path, threshold: float) -> dict[str, float]:
    """Returns the norm of normalized latents above which the loss of tokens is masked.

    If the norms have two populations, it is the one that divides them; else as many tokens exceed
    it as are outliers in the encoder's last block.

    Returns:
      "norm"; "masked_share", the fraction of tokens above it; and "outliers_masked", the fraction
      of the encoder's outliers above it.
    """
    overrides = [*space_of(stages, "outlier"), "--config.space.post_stat_norm=True"]
    config = configs.load(config_of(), overrides)
    space, variables = build.make_space(config)
    images, _ = read_all(build.make_source(config))
    encoded: Any = jax.jit(space.encode_with_norms)(variables, images / np.float32(255))  # type: ignore[attr-defined]
    norms = np.asarray(encoded[1]).reshape(len(images), -1)
    params = load_encoder(str(stages / "encoder_outlier"))[1]
    trace = encoders.trace_encoder(
        encoders.ViT(encoders.ENCODER), params, encoders.read_pixels()[: len(images)]
    )
    outliers = np.linalg.norm(np.asarray(trace.outputs[-1]), axis=-1) >= threshold
    limit = split_norms(norms).threshold or float(np.quantile(norms, 1 - outliers.mean()))
    masked = norms >= limit
    return {
        "norm": limit,
        "masked_share": float(masked.mean()),
        "outliers_masked": float(masked[outliers].mean()),
    }


def _train_decoder(stages: Path, variant: str, steps: int) -> None:
    folder, result = stages / f"decoder_run_{variant}", stages / f"decoder_{variant}"
    if result.exists():
        return
    log(f"decoder of the {variant} encoder")
    train_decoder.main(
        [
            f"--config={CONFIGS / 'rae_decoder.py'}:runlocal",
            f"--workdir={folder}",
            *space_of(stages, variant, decoded=False),
            "--config.space.noise_tau=0.2",
            "--config.decoder.hidden_size=64",
            "--config.decoder.depth=4",
            "--config.decoder.num_heads=4",
            "--config.decoder.mlp_dim=256",
            "--config.decoder.patch_size=4",
            "--config.data.image_size=16",
            "--config.data.crop_from=0",
            "--config.data.global_batch=128",
            "--config.lpips.weight=0.0",
            "--config.gan.weight=0.0",
            "--config.optim.lr=1e-3",
            "--config.optim.final_lr=1e-5",
            "--config.optim.warmup_steps=50",
            f"--config.optim.decay_end_steps={max(steps, 51)}",
            "--config.ema.decays=(0.995,)",
            "--config.sample.ema=0.995",
            f"--config.train.steps={steps}",
            f"--config.checkpoint.every_steps={steps}",
            f"--config.sample.every_steps={steps}",
            "--config.log.every_steps=100",
            "--config.eval.num_samples=360",
        ]
    )
    (folder / read_json(folder / "summary.json")["decoder"]).rename(result)


def _take_statistics(stages: Path, variant: str) -> None:
    encode.main(
        [
            "statistics",
            f"--config={config_of()}",
            f"--out={stages / f'statistics_{variant}'}",
            "--no-flip",
            *space_of(stages, variant, decoded=False),
        ]
    )
