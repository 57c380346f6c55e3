"""Draws images from a trained run: `python -m dsr_jax.sample --workdir=runs/digits --guidance=2.0`.

Settings are those of the run's config unless the command line says otherwise, by the arguments
below or any `--config.KEY=VALUE`. They alone decide which image belongs to an index: the same
command finishes a job that was killed, also with another --batch or number of devices. The result
is an .npz (arr_0: uint8 images, labels) with a .json beside it that holds all that made it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.core.cli import run_main
from dsr_jax.core.errors import ConfigError
from dsr_jax.evaluation.samples import open_samples
from dsr_jax.parallel.processes import is_process_zero, log, start_processes
from dsr_jax.runs.sampling import draw_samples
from dsr_jax.sampling import labels as tables
from dsr_jax.sampling.images import save_png_grid

GRID_IMAGES = 100


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    args, overrides = _parser().parse_known_args(argv)
    config = load_config(args, overrides)
    labels = make_labels(args, config)
    start_processes()
    build.set_precision(config)
    path = draw_samples(
        config,
        labels,
        Path(args.workdir or args.converted),
        converted=bool(args.converted),
        checkpoint_step=args.checkpoint_step,
        out=args.out,
        name=args.name,
    )
    if args.grid and is_process_zero():
        images = next(open_samples(path).batches(GRID_IMAGES))
        save_png_grid(path.with_suffix(".png"), images, labels[:GRID_IMAGES])
        log(f"picture: {path.with_suffix('.png')}")


def load_config(args: argparse.Namespace, overrides: Sequence[str]) -> configs.ConfigDict:
    """Returns the config of the run, or of --config, with the command line's changes.

    Raises:
      ConfigError: If there is no run, or arguments, keys or values cannot be.
    """
    if args.converted:
        if args.ema or args.checkpoint_step is not None or not args.config:
            raise ConfigError(
                "--converted needs --config and goes without --ema and --checkpoint-step",
                "name the config of the same sizes; converted weights are a single set",
            )
        config = configs.load_file(args.config)
    elif args.config:
        raise ConfigError("--config goes with --converted", "a run has its own config")
    else:
        config = configs.load_run(args.workdir)
        # The mesh is this machine's, not the one that trained.
        config.mesh.update(data=-1, fsdp=1, tensor=1, dcn_data=-1, dcn_fsdp=1)
    section = config.sample
    shortcuts = [
        f"--config.sample.{key}={value}"
        for key in section
        if (value := getattr(args, key, None)) is not None
    ]
    configs.apply_overrides(config, [*shortcuts, *overrides])
    configs.check(config)
    for key in ("num", "batch"):
        if section[key] < 1:
            raise ConfigError(f"config.sample.{key}={section[key]}", "it must be positive")
    return config


def make_labels(args: argparse.Namespace, config: configs.ConfigDict) -> np.ndarray:
    """Returns the class of every sample [N], int32.

    Raises:
      DataError: If a label file cannot be read or a label names no class.
    """
    num, classes, seed = config.sample.num, config.data.num_classes, config.sample.seed
    if args.label_file:
        labels = tables.load_labels(args.label_file, num)
    elif args.classes:
        labels = tables.cycled_labels(args.classes, num)
    elif args.random_labels:
        labels = tables.random_labels(num, classes, seed)
    else:
        labels = tables.balanced_labels(num, classes, seed)
    tables.check_labels(labels, classes)
    return labels


def _class_list(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dsr_jax.sample",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--workdir", help="the run's folder")
    weights.add_argument("--converted", help="folder that python -m dsr_jax.convert wrote")
    add("--config", help="with --converted: config file of the same sizes")
    add("--checkpoint-step", type=int, help="which checkpoint; default: the newest")
    add("--ema", help="decay of the averaged weights, or none for the weights themselves")
    add("--num-samples", dest="num", help="how many images")
    add("--batch", help="images at a time over all devices; does not change the images")
    add("--method", help="ODE solver, or sde-euler, sde-heun")
    add("--num-points", dest="num_points", help="points of the time grid, one more than steps")
    add("--guidance", help="scale of classifier-free guidance, 1 for none")
    add("--interval", help="LOW,HIGH: times (0 data, 1 noise) in which guidance is on")
    add("--seed", help="of noise and labels")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--label-file", help=".npy, .npz or .txt with the class of every sample")
    which.add_argument("--classes", type=_class_list, help="for example 3,7: these in turn")
    which.add_argument(
        "--random-labels", action="store_true", help="independent labels; default: balanced ones"
    )
    add("--out", help="folder of the files; default: samples/ in the run's")
    add("--name", help="their name; default: made from the settings")
    add("--grid", action="store_true", help=f"also a .png of the first {GRID_IMAGES} images")
    return parser


if __name__ == "__main__":
    run_main(main)
