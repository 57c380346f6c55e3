"""Runs the encoder over a data set, once, before training.

    python -m dsr_jax.encode statistics --config=configs/x.py --out=DIR
    python -m dsr_jax.encode cache --config=configs/x.py --out=DIR --copies=2

`statistics` computes mean and variance of the latents, by channel and position, of each image
once, half of them mirrored as in the original; `--config.space.statistics=DIR` makes a training run
use them. `cache` writes the latents themselves; with `--config.data.latents=DIR` a training run
reads them instead of images and runs no encoder. Any key of the config can be set behind it, as in
`--config.data.root=imagenet/train`. The same command continues a pass that was stopped, and ends
with the same bits as one that was not. On several hosts DIR must be on storage that all of them
share.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dsr_jax import build
from dsr_jax import config as configs
from dsr_jax.core.cli import count, make_parser, positive_int, run_main
from dsr_jax.core.errors import ConfigError
from dsr_jax.data.latents import DTYPES
from dsr_jax.parallel.processes import lock_folder
from dsr_jax.parallel.watch import join_job
from dsr_jax.runs.encoder_pass import EncoderPass, cache_latents, take_statistics


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    args, overrides = _parser().parse_known_args(argv)
    # Grain's worker processes read absl's flags, which this program does not use.
    flags.FLAGS(sys.argv[:1], known_only=True)
    encode(args, load_config(args, overrides))


@join_job()
def encode(args: argparse.Namespace, config: configs.ConfigDict) -> None:
    """Runs the pass that the command line names, on all processes."""
    build.set_precision(config)
    out = Path(args.out)
    with lock_folder(out):
        if args.what == "statistics":
            take_statistics(EncoderPass(config, args.images), out, args.save_every, args.stop_after)
            return
        images = args.images or len(build.make_source(config))
        cache_latents(
            EncoderPass(config, args.copies * images),
            out,
            args.dtype,
            args.copies,
            args.shard_batches,
            args.stop_after,
        )


def load_config(args: argparse.Namespace, overrides: Sequence[str]) -> configs.ConfigDict:
    """Returns the config of what is to be encoded, without normalization, decoder and noise.

    Raises:
      ConfigError: If keys or values cannot be, or the space has no encoder.
    """
    config = configs.load_file(args.config)
    configs.apply_overrides(config, overrides)
    config.data.update(global_batch=args.batch, flip=args.flip, latents="")
    config.optim.accumulate = 1
    # The encoder's own latents, without normalization, decoder or noise.
    config.space.update(statistics="", decoder="", noise_tau=0.0)
    configs.check(config)
    if config.space.name != "rae":
        raise ConfigError(
            f"config.space.name={config.space.name!r} has no encoder",
            "set --config.space.name=rae and --config.space.encoder=FOLDER",
        )
    return config


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, "python -m dsr_jax.encode")
    what = parser.add_subparsers(required=True, metavar="WHAT", dest="what")
    statistics = what.add_parser("statistics", help="mean and variance of the latents")
    statistics.add_argument(
        "--save-every", type=positive_int, default=100, help="batches between saves"
    )
    cache = what.add_parser("cache", help="the latents, packed into ArrayRecord files")
    cache.add_argument(
        "--copies",
        type=positive_int,
        default=2,
        help="number of copies of each image, mirrored or not as in that many epochs",
    )
    cache.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="stored dtype")
    cache.add_argument("--shard-batches", type=positive_int, default=4, help="batches per file")
    for parts, unit in ((statistics, "batches"), (cache, "files")):
        add = parts.add_argument
        add("--config", required=True, help="config file that names data and space")
        add("--out", required=True, help="folder of the result, new or of the same pass")
        add("--batch", type=positive_int, default=256, help="images per step, over all devices")
        add("--images", type=count, default=0, help="number of samples; default: each image once")
        add(
            "--flip",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="mirror half of the images, as the original does",
        )
        add(
            "--stop-after",
            type=count,
            default=0,
            help=f"stop after so many {unit}; default: at the end",
        )
    return parser


if __name__ == "__main__":
    run_main(main)
