"""Makes an HTML report on the outlier tokens of a run, of converted weights, or of an encoder.

    python tools/inspect_outliers.py --workdir=runs/baseline --out=report.html
    python tools/inspect_outliers.py --workdir=runs/base --compare runs/ttr runs/dsr --out=x.html
    python tools/inspect_outliers.py --encoder=enc/siglip2 --neurons=found/neurons.json \\
        --images=PHOTOS --out=encoder.html
    python tools/inspect_outliers.py --converted=conv/jit --images=PHOTOS --out=jit.html

The report has maps of norms, principal components and attention by block and noise level,
histograms with the fitted threshold, the statistics as CSV, and samples from the same noise and
labels, for up to six networks side by side. It is one file that asks for no other.

Denoisers are measured on images of their run's data, or of --images with the label "no class".
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.convert.hub import load_encoder
from dsr_jax.core.cli import make_parser, positive_int, run_main
from dsr_jax.core.errors import ConfigError
from dsr_jax.core.files import write_atomic
from dsr_jax.data.unlabeled import UnlabeledImages
from dsr_jax.models.intervention import Intervention
from dsr_jax.registers.neurons import load_neurons, neurons_to_mask
from dsr_jax.registers.statistics import STATISTICS
from dsr_jax.reports.outlier_page import MAX_VARIANTS, make_outlier_page
from dsr_jax.runs.inspection import (
    Inspected,
    draw_samples,
    inspect_denoiser,
    inspect_encoder,
    load_converted,
    load_run,
    make_variants,
    read_images,
)
from dsr_jax.runs.official_sources import config_of_converted
from dsr_jax.sampling.images import image_grid


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    args, overrides = _parser().parse_known_args(argv)
    _check(args, overrides)
    times: list[float | None] = [None]
    if args.encoder:
        inspected, images = _encoders(args)
    else:
        inspected, images = _denoisers(args, overrides)
        times = list(args.times)
    title = f"Outlier tokens of {', '.join(each.name for each in inspected)}"
    shown = None if images.shape[-1] not in (1, 3) else image_grid(images, len(images), gap=2)
    variants = make_variants(inspected, args.threshold)
    page = make_outlier_page(title, variants, times, STATISTICS, shown)
    write_atomic(args.out, page)
    for variant in variants:
        worst = max(float(level["outlier_share"].max()) for level in variant.statistics)
        print(f"{variant.name}: at most {worst:.2%} outliers after a block")
    print(f"written: {args.out}")


def _check(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Checks what the parser cannot.

    Raises:
      ConfigError: Naming the argument.
    """
    count = 1 + len(args.compare) + bool(args.encoder and args.neurons)
    if count > MAX_VARIANTS:
        raise ConfigError(
            f"{count} networks to compare", f"give at most {MAX_VARIANTS}, --neurons included"
        )
    if args.neurons and not args.encoder:
        raise ConfigError("--neurons goes with --encoder", "leave it out: a run has its own")
    if args.encoder and not args.images:
        raise ConfigError("--encoder needs images", "add --images=FOLDER")
    if (args.config or overrides) and not args.converted:
        raise ConfigError(
            f"{(args.config or overrides[0])!r} goes with --converted", "leave it out"
        )


def _encoders(args: argparse.Namespace) -> tuple[list[Inspected], np.ndarray]:
    found: list[Inspected] = []
    images = np.zeros(0)
    for folder in (args.encoder, *args.compare):
        config, params = load_encoder(folder)
        size = args.image_size or 16 * config.patch_size
        source = UnlabeledImages(str(args.images), size, count=args.num_images)
        images = read_images(source, args.num_images)["image"]
        mean, std = (np.asarray(x, np.float32) for x in (config.pixel_mean, config.pixel_std))
        pixels = (images.astype(np.float32) / 255 - mean) / std
        found.append(inspect_encoder(folder.name, config, params, pixels))
        if args.neurons and folder == args.encoder:
            mask = neurons_to_mask(load_neurons(args.neurons), config.depth, config.mlp_dim)
            name = f"{folder.name} with test-time registers"
            found.append(inspect_encoder(name, config, params, pixels, Intervention(mask=mask)))
    return found, images


def _denoisers(
    args: argparse.Namespace, overrides: Sequence[str]
) -> tuple[list[Inspected], np.ndarray]:
    found: list[Inspected] = []
    batch: dict[str, np.ndarray] = {}
    for folder in (args.workdir or args.converted, *args.compare):
        parts = _load(args, folder, overrides)
        config, model, params, space, variables, origin = parts
        batch = batch or _batch(args, config, getattr(model, "num_slots", 0))
        one = inspect_denoiser(
            folder.resolve().name,
            config,
            model,
            params,
            space,
            variables,
            batch,
            args.times,
            args.threshold,
        )
        one.notes.insert(0, origin)
        if args.samples:
            one.samples = draw_samples(config, model, params, space, variables, args.samples)
        found.append(one)
    return found, batch["image"]


def _load(args: argparse.Namespace, folder: Path, overrides: Sequence[str]) -> tuple[Any, ...]:
    if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
        return load_run(folder, args.checkpoint_step if folder == args.workdir else None, args.ema)
    if args.config:
        config = configs.load(args.config, overrides)
    else:
        sources = dict.fromkeys(("encoder", "decoder", "statistics", "vae"), "")
        config = config_of_converted(folder, **sources)
        configs.apply_overrides(config, overrides)
    return load_converted(folder, config)


def _batch(
    args: argparse.Namespace, config: configs.ConfigDict, slots: int
) -> dict[str, np.ndarray]:
    """Reads the images that denoisers are measured on.

    Args:
      args: The command line.
      config: Config of the first network.
      slots: Its image slots of a token sequence, 0 if it takes classes.

    Raises:
      ConfigError: If images without captions are given to a network of text.
    """
    if not args.images:
        return read_images(build.make_source(config, slots=slots), args.num_images)
    if slots:
        raise ConfigError(
            f"--images={args.images} has no captions, which a network of text needs",
            "leave it out: the images of the run's own data are measured",
        )
    source = UnlabeledImages(str(args.images), config.data.image_size, count=args.num_images)
    batch = read_images(source, args.num_images)
    if config.data.channels == 1:
        gray = batch["image"].astype(np.float32).mean(-1, keepdims=True)
        batch["image"] = gray.round().astype(np.uint8)
    return {**batch, "label": np.full_like(batch["label"], config.data.num_classes)}


def _times(text: str) -> tuple[float, ...]:
    times = tuple(sorted(float(word) for word in text.split(",")))
    if not all(0 <= time <= 1 for time in times):
        raise argparse.ArgumentTypeError(f"{text}: noise levels are from 0, data, to 1, noise")
    return times


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--workdir", type=Path, help="folder of a run")
    which.add_argument("--converted", type=Path, help="folder of a converted denoiser")
    which.add_argument("--encoder", type=Path, help="folder of a converted encoder")
    add("--compare", nargs="+", type=Path, default=[], help="up to five further networks")
    add("--out", type=Path, required=True, help="file of the report")
    add("--neurons", type=Path, help="register neurons: also the encoder with test-time registers")
    add("--images", type=Path, help="folder of images; default: the run's data")
    add("--num-images", type=positive_int, default=4, help="images to measure")
    add("--image-size", type=positive_int, help="encoder: side in pixels; default: 16 patches")
    add("--times", type=_times, default=(0.1, 0.5, 0.9), help="noise levels, as in 0.1,0.5,0.9")
    add("--threshold", type=float, help="smallest norm of outliers; default: found from the norms")
    add("--samples", type=int, default=16, help="samples of the gallery; 0 for none")
    add("--checkpoint-step", type=int, help="step of the checkpoint; default: the newest")
    add("--ema", help="decay of the EMA weights, or none; default: the run's own")
    add("--config", help="converted: config of the same sizes; --config.KEY=VALUE sets keys")
    return parser


if __name__ == "__main__":
    run_main(main)
