"""Finds the register neurons of an encoder on a sample of images.

    python -m dsr_jax.convert siglip2 --source google/siglip2-base-patch16-256 --out enc/siglip2-b
    python tools/find_registers.py enc/siglip2-b --root imagenet/val --out found/siglip2-b

Writes `neurons.json` (blocks and their units, as test-time registers read them), `report.json` and
`report.html` with figures into --out, and prints the number of outlier patches before and after.
Images come from a folder of any layout, from ArrayRecord files or from TFDS. If the encoder has no
outlier tokens, the command fails with exit status 2, prints the quantiles of the norms and writes
nothing.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsr_jax.convert.hub import load_encoder
from dsr_jax.core.cli import make_parser, run_main
from dsr_jax.core.provenance import provenance
from dsr_jax.data.base import Record, Source
from dsr_jax.data.images import fit_name
from dsr_jax.data.sources import make_source
from dsr_jax.data.unlabeled import UnlabeledImages
from dsr_jax.models.precision import Precision
from dsr_jax.models.vit import ViT
from dsr_jax.parallel.axes import Constrain, make_rules
from dsr_jax.parallel.mesh import MeshShape, make_mesh
from dsr_jax.parallel.processes import is_process_zero
from dsr_jax.parallel.watch import join_job
from dsr_jax.registers.neurons import save_neurons
from dsr_jax.registers.report import check_plotting, outlier_table, write_report
from dsr_jax.registers.scoring import Sparsity
from dsr_jax.registers.search import SearchSettings, find_registers
from dsr_jax.registers.streaming import NormalizedImages


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    args = _parser().parse_args(argv)
    check_plotting()
    search(args)


@join_job()
def search(args: argparse.Namespace) -> None:
    """Searches the encoder that the command line names, on all processes."""
    config, params = load_encoder(args.encoder)
    if config.num_registers:
        print(
            f"warning: {args.encoder} was trained with {config.num_registers} registers, which "
            "take up its outliers; test-time registers are for encoders without"
        )
    source = open_images(args, args.image_size or 16 * config.patch_size)
    settings = _settings(args)
    mesh = make_mesh(MeshShape())
    model = ViT(
        config,
        precision=Precision(args.compute),
        constrain=Constrain(make_rules("replicated"), mesh),
    )
    images = NormalizedImages(source, config.pixel_mean, config.pixel_std)
    result = find_registers(model, params, images, settings, mesh, batch=args.batch)
    if not is_process_zero():
        return
    details = {
        "encoder": {"folder": str(args.encoder), **dataclasses.asdict(config)},
        "images": {"source": source.name, "count": len(source), "seed": args.seed},
        "settings": dataclasses.asdict(settings),
        "provenance": provenance(),
    }
    # The neurons first, since computing them takes longest.
    save_neurons(args.out / "neurons.json", result.neurons)
    print(outlier_table(result))
    write_report(args.out, result, lambda index: source[index]["image"], details)
    print(f"written to {args.out}: neurons.json, report.json, report.html")


def open_images(args: argparse.Namespace, image_size: int) -> Source:
    """Opens the images that the command line names, at most `args.images` of them.

    Raises:
      DataError: If they cannot be read.
    """
    if args.source == "folder":
        images = UnlabeledImages(
            args.root,
            image_size,
            count=args.images,
            seed=args.seed,
            fit=args.fit,
            on_corrupt=args.on_corrupt,
        )
        for path in images.skipped:
            print(f"skipped: {path} cannot be decoded")
        return images
    source = make_source(
        args.source,
        image_size=image_size,
        channels=3,
        root=args.root,
        split=args.split,
        # ArrayRecord files do not hold their classes, which are not needed here.
        num_classes=np.iinfo(np.int32).max if args.source == "arrayrecord" else None,
    )
    return Sample(source, args.images, args.seed)


class Sample:
    """A random sample of the records of a source, without repetition.

    Args:
      source: The records.
      count: Number of records; all if there are fewer.
      seed: Seed of the sample.
    """

    num_classes = 1

    def __init__(self, source: Source, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._source = source
        self._rows = np.sort(rng.permutation(len(source))[:count])
        self.name, self.image_shape = source.name, source.image_shape

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self._rows[index])]


def _settings(args: argparse.Namespace) -> SearchSettings:
    sparsity = Sparsity(args.sparsity_level, args.sparsity_fraction)
    return SearchSettings(
        threshold=args.threshold,
        detect_block=args.detect_block,
        lowest_block=args.lowest_block,
        highest_block=tuple(args.highest_block),
        top_k=tuple(args.top_k),
        rounds=args.rounds,
        sparsity=sparsity if args.sparsity_filter else None,
        mean_token=args.mean_token,
        num_registers=args.num_registers,
        exclude_registers=args.exclude_registers,
        exclude_found=args.exclude_found,
        as_released=args.as_released,
    )


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("encoder", type=Path, help="folder that dsr_jax.convert wrote")
    add("--out", type=Path, required=True, help="folder for the neurons and the report")
    add("--batch", type=int, default=8, help="images per step, over all devices")
    add("--compute", default="float32", choices=["float32", "bfloat16"], help="compute dtype")
    _add_images(parser)
    _add_search(parser)
    return parser


def _add_images(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("images").add_argument
    add("--source", default="folder", help="folder, arrayrecord, tfds:NAME, synthetic")
    add("--root", help="folder of the images or records; data_dir of TFDS")
    add("--split", default="train", help="split of arrayrecord and tfds")
    add("--images", type=int, default=500, help="number of images")
    add("--seed", type=int, default=0, help="seed of the sample")
    add("--image-size", type=int, help="side in pixels; default: 16 patches, as in RAE")
    add(
        "--fit",
        default="squash",
        type=fit_name,
        choices=["squash", "center_crop"],
        help="how images of a folder are made square; the other sources crop",
    )
    add(
        "--on-corrupt",
        default="error",
        choices=["error", "skip"],
        help="what to do about files of a folder that cannot be decoded",
    )


def _add_search(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("search").add_argument
    add("--threshold", type=float, help="smallest norm of outliers; default: found from the norms")
    add("--detect-block", type=int, default=-1, help="block after which norms are measured")
    add("--lowest-block", type=int, default=0, help="first block to choose from")
    add(
        "--highest-block",
        type=int,
        nargs="+",
        default=[-1],
        help="last block to choose from, by round; -1: no limit",
    )
    add("--top-k", type=int, nargs="+", default=[50], help="units to choose, by round")
    add("--rounds", type=int, help="number of rounds; default: until no outliers are left")
    add("--sparsity-filter", action="store_true", help="drop units that are active everywhere")
    add(
        "--sparsity-level",
        type=float,
        default=0.5,
        help="largest activation that counts as idle",
    )
    add("--sparsity-fraction", type=float, default=0.5, help="fraction of tokens that must be idle")
    add(
        "--mean-token",
        action=argparse.BooleanOptionalAction,
        help="count the mean token; default: for encoders without class token",
    )
    add("--num-registers", type=int, default=1, help="test-time registers in later rounds")
    add("--exclude-registers", action="store_true", help="do not count registers as outliers")
    add("--exclude-found", action="store_true", help="do not choose a unit twice")
    add(
        "--as-released",
        action="store_true",
        help="later rounds overwrite the last patch, as the released code does",
    )


if __name__ == "__main__":
    run_main(main)
