"""Turns ImageNet, or any folder of class folders, into ArrayRecord shards for training.

    python tools/prepare_imagenet.py ILSVRC2012_img_train.tar imagenet --size=256
    python tools/prepare_imagenet.py ILSVRC2012_img_val.tar imagenet --split=val --classes=val.txt
    python tools/prepare_imagenet.py FOLDER packed --format=keep
    python tools/prepare_imagenet.py --verify imagenet

Images are cropped to the central square as in ADM, once, and stored without loss (png) or as JPEG
of quality 95; `--format=keep` stores the files as they are. Then train with
`--config.data.source=arrayrecord --config.data.root=OUT`. A shard appears when it is whole, so the
same command continues what was stopped. OUT/SPLIT.json keeps settings, counts and digests, which
`--verify` compares with the files.
"""

import argparse
import functools
import io
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dsr_jax.core.cli import run_main
from dsr_jax.core.errors import DataError, UnreadableRecord
from dsr_jax.core.files import file_digest, read_json, write_json
from dsr_jax.data.archives import ImageTar, read_classes
from dsr_jax.data.base import SourceOptions
from dsr_jax.data.folder import ImageFolder
from dsr_jax.data.images import decode_image
from dsr_jax.data.records import count_records, write_array_records

FORMATS = ("png", "jpeg", "keep")


@dataclass(frozen=True)
class Recipe:
    """What decides the content of the shards.

    Attributes:
      source: Path of the archive or folder.
      split: Prefix of the shards' names.
      classes: File that tells the classes of an archive of images, or "".
      shards: How many.
      size: Side of the images; of no effect with "keep".
      format: A name in FORMATS.
      on_corrupt: "error" stops at a damaged image; "skip" leaves it out and lists it.
    """

    source: str
    split: str
    classes: str
    shards: int
    size: int
    format: str
    on_corrupt: str


@functools.cache
def open_source(recipe: Recipe) -> ImageTar | ImageFolder:
    """The images; read once per process."""
    if recipe.source.endswith(".tar"):
        return ImageTar(recipe.source, read_classes(recipe.classes) if recipe.classes else None)
    return ImageFolder(SourceOptions(1, root=recipe.source, split=recipe.split))


def shard_name(recipe: Recipe, shard: int) -> str:
    """Name of a shard's file."""
    return f"{recipe.split}-{shard:05d}-of-{recipe.shards:05d}.array_record"


def pack_shard(recipe: Recipe, out: Path, shard: int) -> dict[str, Any]:
    """Writes one shard; returns its count, digest and the damaged files that it lacks."""
    source, skipped = open_source(recipe), []
    first, last = (len(source) * edge // recipe.shards for edge in (shard, shard + 1))

    def records() -> Iterator[tuple[bytes, int]]:
        for index in range(first, last):
            content, label = source.encoded(index)
            try:
                yield _store(recipe, content, source.origin(index)), label
            except UnreadableRecord as error:
                if recipe.on_corrupt == "error":
                    raise
                skipped.append(str(error).splitlines()[0])

    path = out / shard_name(recipe, shard)
    write_array_records(path, records())
    return {
        "records": last - first - len(skipped),
        "digest": file_digest(path),
        "skipped": skipped,
    }


def _store(recipe: Recipe, content: bytes, origin: str) -> bytes:
    if recipe.format == "keep":
        return content
    from PIL import Image

    pixels = decode_image(content, origin, recipe.size, channels=3)
    buffer = io.BytesIO()
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if recipe.format == "jpeg" else {}
    Image.fromarray(pixels).save(buffer, recipe.format.upper(), **options)
    return buffer.getvalue()


def prepare(recipe: Recipe, out: Path, workers: int) -> None:
    """Packs the shards that are not there yet.

    Raises:
      DataError: If the folder holds shards of other settings, or an image is damaged.
    """
    source, path = open_source(recipe), out / f"{recipe.split}.json"
    manifest = {
        "recipe": vars(recipe),
        "images": len(source),
        "class_names": source.class_names,
        "shards": {},
    }
    if path.exists():
        found = read_json(path)
        differing = [
            f"{key}: {found['recipe'].get(key)} -> {value}"
            for key, value in vars(recipe).items()
            if found["recipe"].get(key) != value
        ]
        if differing or found["images"] != len(source):
            raise DataError(
                f"{out} holds shards of other settings or images: {'; '.join(differing)}",
                "name another folder, or use the settings that it was started with",
            )
        manifest = found
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, manifest)
    names = {shard: shard_name(recipe, shard) for shard in range(recipe.shards)}
    done = {s for s, name in names.items() if name in manifest["shards"] and (out / name).exists()}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = {pool.submit(pack_shard, recipe, out, s): s for s in names if s not in done}
        try:
            for job in as_completed(jobs):
                manifest["shards"][names[jobs[job]]] = job.result()
                write_json(path, manifest)
                count = len(manifest["shards"])
                print(f"{recipe.split}: {count} of {recipe.shards} shards", file=sys.stderr)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    shards = manifest["shards"].values()
    skipped = [line for shard in shards for line in shard["skipped"]]
    for line in skipped:
        print(f"left out: {line}", file=sys.stderr)
    print(
        f"{sum(shard['records'] for shard in shards)} images, {len(source.class_names)} classes, "
        f"{len(skipped)} left out: {out}"
    )


def verify(out: Path) -> None:
    """Compares the shards of every split with their counts and digests.

    Raises:
      DataError: Naming the first that is missing, damaged or of another count.
    """
    manifests = sorted(out.glob("*.json"))
    if not manifests:
        raise DataError(f"{out} holds no SPLIT.json", "name a folder that this tool wrote")
    for path in manifests:
        manifest = read_json(path)
        missing = manifest["recipe"]["shards"] - len(manifest["shards"])
        if missing:
            raise DataError(f"{path}: {missing} shards are not packed yet", "run the command again")
        for name, shard in sorted(manifest["shards"].items()):
            file = out / name
            if not file.exists() or file_digest(file) != shard["digest"]:
                problem = "is damaged" if file.exists() else "is missing"
                raise DataError(f"{file} {problem}", "delete it and pack again")
            if count_records(file) != shard["records"]:
                raise DataError(f"{file} does not hold {shard['records']} images", "pack it again")
        total = sum(shard["records"] for shard in manifest["shards"].values())
        print(f"{path.stem}: {total} images in {len(manifest['shards'])} shards, as written")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", nargs="?", default="", help="tar file, or folder of class folders"
    )
    parser.add_argument("out", type=Path, help="folder for the shards")
    parser.add_argument("--verify", action="store_true", help="check what OUT holds; packs nothing")
    parser.add_argument("--split", default="train", help="name of the shards; subfolder to read")
    parser.add_argument("--classes", default="", help="file of lines FILE CLASS, for val.tar")
    parser.add_argument("--shards", type=int, default=128)
    parser.add_argument("--size", type=int, default=256, help="side of the images, in pixels")
    parser.add_argument("--format", choices=FORMATS, default="png")
    parser.add_argument("--on-corrupt", choices=("error", "skip"), default="error")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    args = parser.parse_args(argv)
    if args.verify:
        verify(args.out)
        return
    if not args.source:
        parser.error("name the source and the folder for the shards")
    names = ("source", "split", "classes", "shards", "size", "format", "on_corrupt")
    recipe = Recipe(**{name: getattr(args, name) for name in names})
    prepare(recipe, args.out, args.workers)


if __name__ == "__main__":
    run_main(main)
