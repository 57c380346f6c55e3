"""Samples images of a trained run: `python -m dsr_jax.sample --workdir=runs/digits --guidance=2.0`.

Settings are those of the run's config unless the command line changes them, by the arguments
below or any `--config.KEY=VALUE`. They alone decide which image belongs to an index: the same
command finishes a job that was killed, also with another --batch or number of devices. The result
is an .npz (arr_0: uint8 images, labels) with a .json beside it that holds all that made it.

Official checkpoints need no run and no encoder, and are converted on the way:

    python -m dsr_jax.sample --converted=ep-0000080.pt --decoder=model.pt --statistics=stat.pt \\
        --encoder=siglip2-base --num-samples=16 --grid
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.core.cli import make_parser, positive_int, run_main
from dsr_jax.core.errors import ConfigError
from dsr_jax.data.classes import DataDescription, read_class_names, trained_labels
from dsr_jax.diffusion.samplers import SAMPLERS
from dsr_jax.evaluation.samples import open_samples
from dsr_jax.parallel.processes import is_process_zero, log
from dsr_jax.parallel.watch import join_job
from dsr_jax.runs.official_sources import (
    check_sources,
    config_of_converted,
    convert_cached,
    default_cache,
    family_of_source,
    is_converted,
)
from dsr_jax.runs.sampled_classes import (
    classes_of_converted,
    classes_to_sample,
    parse_classes,
)
from dsr_jax.runs.sampling import save_samples
from dsr_jax.sampling import labels as tables
from dsr_jax.sampling.batch import AUTO
from dsr_jax.sampling.images import save_png_grid
from dsr_jax.sampling.prompts import read_prompts

GRID_IMAGES = 100
SOURCES = ("encoder", "decoder", "statistics", "vae")
CONVERTED_ONLY = ("config", "options", "decoder_options", "cache")
OWN = "default: the config's"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    sample(*_parser().parse_known_args(argv))


@join_job()
def sample(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Samples the images that the command line asks for, on all processes."""
    if args.converted:
        convert_sources(args)
    folder = Path(args.workdir or args.converted).expanduser()
    config = load_config(args, overrides)
    data = classes_of_converted(folder) if args.converted else read_class_names(folder)
    prompts = make_prompts(args, config)
    if prompts:
        config.sample.num = len(prompts) * args.images_per_prompt
        labels = np.repeat(np.arange(len(prompts)), args.images_per_prompt)
        data = None
    else:
        labels = make_labels(args, config, data)
    build.set_precision(config)
    if data is not None:
        _warn_of_untrained(labels, config.data.num_classes, data)
    path = save_samples(
        config,
        labels,
        folder,
        converted=bool(args.converted),
        checkpoint_step=args.checkpoint_step,
        out=args.out,
        name=args.name,
        data=data,
        prompts=prompts,
    )
    if (args.grid or prompts) and is_process_zero():
        images, shown = next(open_samples(path).batches(GRID_IMAGES)), labels[:GRID_IMAGES]
        texts = [prompts[number] for number in shown] if prompts else shown
        columns = args.images_per_prompt if args.images_per_prompt > 1 else None
        save_png_grid(path.with_suffix(".png"), images, texts, columns=columns)
        log(f"picture: {path.with_suffix('.png')}")


def load_config(args: argparse.Namespace, overrides: Sequence[str]) -> configs.ConfigDict:
    """Returns the config of the run, or of --config, with the command line's changes.

    Raises:
      ConfigError: If there is no run, or arguments, keys or values cannot be.
    """
    files = {key: getattr(args, key) for key in SOURCES}
    if args.converted:
        if args.ema or args.checkpoint_step is not None:
            raise ConfigError(
                "--converted goes without --ema and --checkpoint-step",
                "leave them out: converted weights are a single set",
            )
        if args.config:
            config = configs.load_file(args.config)
            given = {key: value for key, value in files.items() if value}
            config.space.update({key: "" if x == "none" else x for key, x in given.items()})
        else:
            config = config_of_converted(Path(args.converted), **files)
    elif useless := [key for key in (*SOURCES, *CONVERTED_ONLY) if getattr(args, key)]:
        raise ConfigError(
            f"--{useless[0].replace('_', '-')} goes with --converted",
            "leave it out: a run has its own; change single keys with --config.KEY=VALUE",
        )
    else:
        config = configs.load_run(Path(args.workdir).expanduser())
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
    return config


def convert_sources(args: argparse.Namespace) -> None:
    """Replaces official sources on the command line by folders of their conversions, in place.

    Raises:
      ConfigError: If the denoiser needs another source, or none that is given.
      ConversionError: If a source is missing, damaged or of another kind.
    """
    cache = Path(args.cache).expanduser() if args.cache else default_cache()
    if not is_converted(args.converted):
        args.out = args.out or "samples"
    family = family_of_source(args.converted)
    if not args.config:
        check_sources(family, {key: getattr(args, key) for key in SOURCES})
    kinds = (
        ("converted", family, args.options),
        ("decoder", "decoder", args.decoder_options),
        ("vae", "sdvae", ""),
    )
    for key, kind, options in kinds:
        if source := getattr(args, key):
            setattr(args, key, str(convert_cached(source, kind, options, cache)))


def make_prompts(args: argparse.Namespace, config: configs.ConfigDict) -> list[str]:
    """Returns the prompts to sample; [] for a model of classes.

    Raises:
      ConfigError: If a model of text has no prompt or is given classes, or one of classes a prompt.
      DataError: If the file of prompts cannot be read, or a line of it holds none.
    """
    prompts = list(args.prompt or ())
    if args.prompt_file:
        prompts += read_prompts(args.prompt_file)
    if not configs.has_text(config):
        if prompts:
            raise ConfigError(
                "--prompt and --prompts go with a model of text, and this one has classes",
                "name classes with --classes",
            )
        return []
    if args.label_file or args.classes is not None or args.random_labels or args.num is not None:
        raise ConfigError(
            "this is a model of text: it has no classes, and as many samples as prompts",
            "use --prompt, --prompts and --images-per-prompt",
        )
    prompts = prompts or list(config.sample.prompts)
    if not prompts:
        raise ConfigError("there is no prompt", "use --prompt 'TEXT' or --prompts FILE")
    return prompts


def make_labels(
    args: argparse.Namespace, config: configs.ConfigDict, data: DataDescription | None
) -> np.ndarray:
    """Returns the class of every sample [N], int32.

    Args:
      args: The command line.
      config: Experiment config.
      data: The run's classes, where they are known.

    Raises:
      DataError: If a label file cannot be read, a label names no class, or a name is unknown.
    """
    num, rows, seed = config.sample.num, config.data.num_classes, config.sample.seed
    classes = classes_to_sample(config, data)
    if args.label_file:
        labels = tables.load_labels(args.label_file, num)
    elif args.classes is not None:
        labels = tables.cycled_labels(parse_classes(args.classes, data), num)
    elif args.random_labels:
        labels = tables.random_labels(num, classes, seed)
    else:
        labels = tables.balanced_labels(num, classes, seed)
    tables.check_labels(labels, rows)
    return labels


def _warn_of_untrained(labels: np.ndarray, rows: int, data: DataDescription) -> None:
    if untrained := sorted(set(labels.tolist()) - set(trained_labels(data, rows))):
        shown = ", ".join(map(str, untrained[:8])) + (", ..." if len(untrained) > 8 else "")
        log(f"warning: training had no images of the classes {shown}")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, "python -m dsr_jax.sample")
    add = parser.add_argument
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--workdir", help="the run's folder")
    weights.add_argument(
        "--converted", help="folder that python -m dsr_jax.convert wrote, or an official checkpoint"
    )
    official = parser.add_argument_group("with --converted")
    more = official.add_argument
    more("--encoder", default="", help="encoder of the latents: dinov2-base, ..., or a folder")
    more("--decoder", default="", help="RAE's decoder: official file or converted folder")
    more("--statistics", default="", help="RAE's: stat.pt or ours; none without normalization")
    more("--vae", default="", help="SiT's autoencoder: snapshot, file or converted folder")
    more("--config", help="config file of the same sizes; default: the family's recipe")
    more(
        "--options",
        default="",
        help="options of python -m dsr_jax.convert, as --options='--num-heads 12'",
    )
    more("--decoder-options", default="", help="options of the conversion of the decoder")
    more("--cache", help="folder of conversions; default: $DSR_CACHE, or ~/.cache/dsr_jax")
    add("--checkpoint-step", type=int, help="step of the checkpoint; default: the newest")
    add("--ema", help=f"decay of the EMA weights, or none for the weights themselves; {OWN}")
    add("--num-samples", dest="num", help=f"how many images; {OWN}")
    add(
        "--batch",
        type=lambda text: str(AUTO) if text == "auto" else text,
        help=f"images at a time over all devices, or auto for as many as fit; {OWN}",
    )
    add("--method", help=f"{', '.join(SAMPLERS)}, or package.module:function; {OWN}")
    add("--num-points", dest="num_points", help=f"points of the time grid, steps + 1; {OWN}")
    add("--guidance", help=f"scale of guidance, 1 for none; {OWN}")
    add("--autoguidance", help=f"folder of a weaker model that guidance leads away from; {OWN}")
    add("--interval", help=f"LOW,HIGH: times (0 data, 1 noise) in which guidance is on; {OWN}")
    add("--seed", help=f"of noise and labels; {OWN}")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--label-file", help=".npy, .npz or .txt with the class of every sample")
    which.add_argument(
        "--classes", help="labels or names, for example 3,7 or cat,dog, used in rotation"
    )
    which.add_argument(
        "--random-labels", action="store_true", help="independent labels; default: balanced ones"
    )
    add("--prompt", action="append", metavar="TEXT", help="text to show; repeatable")
    add(
        "--prompts",
        dest="prompt_file",
        metavar="FILE",
        help="one prompt per line, or .jsonl with the key prompt",
    )
    add(
        "--images-per-prompt", type=positive_int, default=1, help="images of each prompt, with text"
    )
    add(
        "--all-classes",
        dest="all_classes",
        action="store_const",
        const="True",
        help="include classes without training images; default: exclude them",
    )
    add(
        "--out",
        help="folder of the files; default: samples/ next to the weights, or here for a checkpoint",
    )
    add("--name", help="name of the files; default: made from the settings")
    add("--grid", action="store_true", help=f"also a .png of the first {GRID_IMAGES} images")
    return parser


if __name__ == "__main__":
    run_main(main)
