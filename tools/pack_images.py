"""Packs class folders of image files into ArrayRecord files for config.data.source=arrayrecord.

    python tools/pack_images.py /data/imagenet /data/imagenet_packed --split=train --shards=64

The files go in as they are, in the order and with the labels of config.data.source=folder.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dsr_jax.core.cli import run_main
from dsr_jax.data.folder import ImageFolder
from dsr_jax.data.records import write_array_records


def main(argv: Sequence[str] | None = None) -> None:
    """Packs the folder that the command line names; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Packs image folders into ArrayRecord files.")
    parser.add_argument("root", help="folder of class folders, or of splits")
    parser.add_argument("out", type=Path, help="folder for the packed files")
    parser.add_argument("--split", default="train")
    parser.add_argument("--shards", type=int, default=16)
    args = parser.parse_args(argv)
    source = ImageFolder(args.root, args.split, image_size=1, channels=3)
    args.out.mkdir(parents=True, exist_ok=True)
    for shard in range(args.shards):
        first, last = (len(source) * edge // args.shards for edge in (shard, shard + 1))
        path = args.out / f"{args.split}-{shard:05d}-of-{args.shards:05d}.array_record"
        write_array_records(path, map(source.encoded, range(first, last)))
    print(f"{len(source)} images, {source.num_classes} classes: {args.out}")


if __name__ == "__main__":
    run_main(main)
