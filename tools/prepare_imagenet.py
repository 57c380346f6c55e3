"""Turns ImageNet, or any folder of class folders, into ArrayRecord shards for training.

    python tools/prepare_imagenet.py ILSVRC2012_img_train.tar imagenet --size=256
    python tools/prepare_imagenet.py ILSVRC2012_img_val.tar imagenet --split=val --classes=val.txt
    python tools/prepare_imagenet.py FOLDER packed --format=keep
    python tools/prepare_imagenet.py --verify imagenet

Images are center-cropped as in ADM, once, and stored without loss (png) or as JPEG of quality 95;
`--format=keep` stores the files as they are. Then train with
`--config.data.source=arrayrecord --config.data.root=OUT`. OUT/SPLIT.json records settings, class
names, counts and digests. The same command continues one that was stopped: shards whose digest is
the recorded one are kept, all others are made. `--verify` compares the files with the record.
"""

import dataclasses
import functools
import io
import multiprocessing
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dsr_jax.core.cli import leave, make_parser, run_main
from dsr_jax.core.errors import DataError, DsrError, UnreadableRecord
from dsr_jax.core.files import file_digest, read_json, remove_leftovers, write_json
from dsr_jax.core.images import is_hidden
from dsr_jax.core.lock import FolderLock
from dsr_jax.core.workers import end_with_parent
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
      classes: File with the classes of an archive of images, or "".
      shards: Number of shards.
      size: Side of the images; without effect with "keep".
      format: A name in FORMATS.
      on_corrupt: "error" stops at a damaged image; "skip" leaves it out and lists it.
      class_map: File that gives class names their labels, or "" for the order of strings.
    """

    source: str
    split: str
    classes: str
    shards: int
    size: int
    format: str
    on_corrupt: str
    class_map: str = ""


@functools.cache
def open_source(recipe: Recipe) -> ImageTar | ImageFolder:
    """Opens the images; read once per process."""
    if recipe.source.endswith(".tar"):
        classes = read_classes(recipe.classes) if recipe.classes else None
        return ImageTar(recipe.source, classes, recipe.class_map)
    options = SourceOptions(1, root=recipe.source, split=recipe.split, class_map=recipe.class_map)
    return ImageFolder(options)


def shard_name(recipe: Recipe, shard: int) -> str:
    """Returns the name of a shard's file."""
    return f"{recipe.split}-{shard:05d}-of-{recipe.shards:05d}.array_record"


def pack_shard(
    recipe: Recipe, out: Path, shard: int, known: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Writes one shard, unless its file is there with the digest in `known`.

    Returns:
      Its number of records, images by label, digest, and the damaged files that were left out.
    """
    path = out / shard_name(recipe, shard)
    if known and path.exists() and file_digest(path) == known["digest"]:
        return dict(known)
    source = open_source(recipe)
    skipped: list[str] = []
    counts = [0] * len(source.class_names)
    first, last = (len(source) * edge // recipe.shards for edge in (shard, shard + 1))

    def records() -> Iterator[tuple[bytes, int]]:
        for index in range(first, last):
            content, label = source.encoded(index)
            try:
                stored = _store(recipe, content, source.origin(index))
            except UnreadableRecord as error:
                if recipe.on_corrupt == "error":
                    raise
                skipped.append(str(error).splitlines()[0])
                continue
            counts[label] += 1
            yield stored, label

    write_array_records(path, records())
    return {
        "records": sum(counts),
        "class_counts": counts,
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
    """Packs the shards that are missing or damaged.

    Raises:
      DataError: If the folder holds shards of other settings, or an image is damaged.
      LockError: If another command packs into the folder.
    """
    with FolderLock(out, lost=leave):
        remove_leftovers(out)
        _prepare(recipe, out, workers)


def _prepare(recipe: Recipe, out: Path, workers: int) -> None:
    """Packs into a folder that no other command writes."""
    source, path = open_source(recipe), out / f"{recipe.split}.json"
    manifest = {
        "recipe": vars(recipe),
        "images": len(source),
        "class_names": source.class_names,
        "shards": {},
    }
    if path.exists():
        manifest["shards"] = _recorded_shards(path, manifest)
    write_json(path, manifest)
    names = {shard: shard_name(recipe, shard) for shard in range(recipe.shards)}
    recorded = manifest["shards"]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=end_with_parent) as pool:
        jobs = {
            pool.submit(pack_shard, recipe, out, shard, recorded.get(name)): name
            for shard, name in names.items()
        }
        try:
            for count, job in enumerate(as_completed(jobs), start=1):
                recorded[jobs[job]] = job.result()
                write_json(path, manifest)
                print(f"{recipe.split}: {count} of {recipe.shards} shards", file=sys.stderr)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    shards = recorded.values()
    skipped = [line for shard in shards for line in shard["skipped"]]
    for line in skipped:
        print(f"left out: {line}", file=sys.stderr)
    print(
        f"{sum(shard['records'] for shard in shards)} images, {len(source.class_names)} classes, "
        f"{len(skipped)} left out: {out}"
    )


def _recorded_shards(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Reads what an earlier start with the same settings recorded of its shards.

    Raises:
      DataError: If settings, images or class names were others.
    """
    found = _read_manifest(path)
    # A setting that is younger than the file had its default's effect.
    old = {"class_map": "", **found["recipe"]}
    differing = [
        f"{key}: {old.get(key)} -> {value}"
        for key, value in manifest["recipe"].items()
        if old.get(key) != value
    ]
    differing += [
        f"{key} of the source have changed"
        for key in ("images", "class_names")
        if found[key] != manifest[key]
    ]
    if differing:
        raise DataError(
            f"{path.parent} holds shards of other settings or images: {'; '.join(differing)}",
            "name another folder, or use the settings that it was started with",
        )
    return found["shards"]


def _read_manifest(path: Path) -> dict[str, Any]:
    """Reads a SPLIT.json.

    Raises:
      DataError: If it is damaged.
    """
    remedy = "remove it and run the command again, which makes every shard anew"
    try:
        found = read_json(path)
        for shard in found["shards"].values():
            if type(shard["records"]) is not int or not isinstance(shard["skipped"], list):
                raise ValueError("the record of a shard has other types")
            str(shard["digest"])
        if type(found["recipe"]["shards"]) is not int:
            raise ValueError("the number of shards is missing")
        found["images"], found["class_names"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, DsrError) as error:
        raise DataError(f"{path} is damaged: {error!r}", remedy) from error
    return found


def verify(out: Path) -> None:
    """Compares the shards of every split with their counts and digests.

    Raises:
      DataError: Naming the first that is missing, damaged or of another count.
    """
    manifests = sorted(path for path in out.glob("*.json") if not is_hidden(path.name))
    if not manifests:
        raise DataError(f"{out} holds no SPLIT.json", "name a folder that this tool wrote")
    for path in manifests:
        manifest = _read_manifest(path)
        missing = manifest["recipe"]["shards"] - len(manifest["shards"])
        if missing:
            raise DataError(f"{path}: {missing} shards are not packed yet", "run the command again")
        for name, shard in sorted(manifest["shards"].items()):
            file = out / name
            if not file.exists() or file_digest(file) != shard["digest"]:
                problem = "is damaged" if file.exists() else "is missing"
                raise DataError(f"{file} {problem}", "the same command makes it anew")
            if count_records(file) != shard["records"]:
                raise DataError(
                    f"{file} does not hold {shard['records']} images",
                    "delete it and run the same command again",
                )
        total = sum(shard["records"] for shard in manifest["shards"].values())
        print(f"{path.stem}: {total} images in {len(manifest['shards'])} shards, as written")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "source", nargs="?", default="", help="tar file, or folder of class folders"
    )
    parser.add_argument("out", type=Path, help="folder for the shards")
    parser.add_argument("--verify", action="store_true", help="check what OUT holds; packs nothing")
    parser.add_argument("--split", default="train", help="name of the shards; subfolder to read")
    parser.add_argument("--classes", default="", help="file of lines FILE CLASS, for val.tar")
    parser.add_argument(
        "--class-map", default="", help="file of class names in the order of their labels"
    )
    parser.add_argument("--shards", type=int, default=128, help="number of files")
    parser.add_argument("--size", type=int, default=256, help="side of the images, in pixels")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="png",
        help="png and jpeg store cropped images, keep stores the files as they are",
    )
    parser.add_argument(
        "--on-corrupt",
        choices=("error", "skip"),
        default="error",
        help="what to do about files that cannot be decoded",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=multiprocessing.cpu_count(),
        help="number of processes; default: one per core",
    )
    args = parser.parse_args(argv)
    if args.verify:
        verify(args.out)
        return
    if not args.source:
        parser.error("name the source and the folder for the shards")
    for name in ("shards", "size", "workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}={getattr(args, name)}: it must be positive")
    names = [field.name for field in dataclasses.fields(Recipe)]
    recipe = Recipe(**{name: getattr(args, name) for name in names})
    prepare(recipe, args.out, args.workers)


if __name__ == "__main__":
    run_main(main)
