"""Runs of the experiment: the same denoiser on five kinds of latents, with the same scores."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsr_jax import build, sample, train
from dsr_jax import config as configs
from dsr_jax.core.files import read_json, write_json
from dsr_jax.core.rng import root_key
from dsr_jax.data.sources import make_source, read_all
from dsr_jax.evaluation.classifier import classifier_scores
from dsr_jax.evaluation.samples import open_samples
from dsr_jax.parallel.processes import log
from dsr_jax.registers.statistics import measure_denoiser, summarize
from dsr_jax.training.checkpoints import restore_params
from tools.claims.stages import Sizes, config_of, space_of

ARMS = {
    "clean": "clean encoder",
    "outlier": "encoder with outliers",
    "masked": "the same, their loss masked",
    "ttr": "outliers, test-time registers",
    "dsr": "outliers, TTR, diffusion registers",
}
VARIANT_OF = {
    "clean": "clean",
    "outlier": "outlier",
    "masked": "outlier",
    "ttr": "cured",
    "dsr": "cured",
}
"""Encoder of each kind of run, one of `stages.VARIANTS`."""
PROBE_IMAGES = 128


def run_arm(
    folder: Path, stages: Path, arm: str, seed: int, sizes: Sizes, limit: float
) -> dict[str, Any]:
    """Trains, samples and scores one run, skipping finished work, and returns its scores.

    Args:
      folder: Folder of the run.
      stages: Folder that `make_stages` filled.
      arm: Name in ARMS.
      seed: Seed of data order, parameters and noise.
      sizes: Training lengths.
      limit: Norm above which "masked" excludes latents from the loss.
    """
    path = folder / "scores.json"
    if path.exists():
        # Older runs have the keys "judge_*".
        record = read_json(path)
        return {key.replace("judge_", "classifier_"): value for key, value in record.items()}
    log(f"{arm}, seed {seed}: {ARMS[arm]}")
    overrides = [
        *space_of(stages, VARIANT_OF[arm]),
        f"--config.seed={seed}",
        f"--config.train.steps={sizes.steps}",
        f"--config.optim.decay_end_steps={max(sizes.steps, 51)}",
        f"--config.sample.every_steps={sizes.steps}",
    ]
    if arm == "masked":
        overrides.append("--config.space.post_stat_norm=True")
        overrides.append(f"--config.objective.outlier_norm={limit}")
    config = config_of(registers=4 if arm == "dsr" else 0)
    train.main([f"--config={config}", f"--workdir={folder}", *overrides])
    sample.main(
        [
            f"--workdir={folder}",
            f"--out={folder / 'scored'}",
            "--name=samples",
            f"--num-samples={sizes.samples}",
            "--batch=100",
        ]
    )
    scores = _classify(folder / "scored" / "samples.npz")
    shares = denoiser_outliers(folder)
    record = {
        "arm": arm,
        "seed": seed,
        "classifier_accuracy": scores["classifier_accuracy"],
        "frechet_distance": scores["frechet_distance"],
        "frechet_distance_real": scores["frechet_distance_real"],
        "classifier_accuracy_real": scores["classifier_accuracy_real"],
        "denoiser_outlier_share": max(shares),
        "denoiser_outlier_shares": shares,
        "train_seconds": read_json(folder / "summary.json")["train_seconds"],
    }
    write_json(path, record)
    return record


def to_digits(images: np.ndarray) -> np.ndarray:
    """Reduces images [N, H, W, 3] to the scans' own 8 x 8 gray pixels, uint8 [N, 8, 8, 1]."""
    side = images.shape[1] // 8
    gray = images.astype(np.float32).mean(-1).reshape(-1, 8, side, 8, side).mean((2, 4))
    return np.round(gray).astype(np.uint8)[..., None]


def _classify(path: Path) -> dict[str, Any]:
    samples = open_samples(path)
    real = [
        read_all(make_source("digits", image_size=8, channels=1, split=split))
        for split in ("train", "heldout")
    ]
    images = to_digits(np.asarray(samples.images()))
    return classifier_scores(images, samples.require_labels("the classifier"), *real)


def denoiser_outliers(folder: Path) -> list[float]:
    """Returns the fraction of outlier patch tokens after each block, on half-noised latents."""
    config = configs.load_run(folder)
    space, variables = build.make_space(config)
    model = build.make_model(config, space)
    mesh, rules = build.make_mesh(config), build.make_rules(config)
    abstract = build.abstract_params(model, space, mesh, rules)
    params, _ = restore_params(folder / "checkpoints", abstract, None, config.sample.ema)
    images, labels = read_all(build.make_source(config, "heldout"))
    images, labels = images[:PROBE_IMAGES], labels[:PROBE_IMAGES]
    latents = space.encode(variables, jnp.asarray(images, jnp.float32) / 255)
    noise = jax.random.normal(root_key(0), latents.shape)
    x, time = (latents + noise) / 2, jnp.full(len(images), 0.5)
    measures = jax.jit(functools.partial(measure_denoiser, model))(params, x, time, labels)
    return summarize(jax.device_get(measures))["outlier_share"].tolist()
