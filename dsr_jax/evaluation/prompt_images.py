"""Images of text-to-image benchmarks in the folders that the official tools read.

    GenEval    OUT/00000/metadata.jsonl and OUT/00000/samples/0000.png, ... of each prompt
    DPG-Bench  OUT/NAME.png of each prompt file NAME.txt, a grid of two images in a row

The seed of an image follows from the benchmark's seed, the prompt's number and the image's number,
so that batches and restarts change nothing. What made the images is in `OUT.json` beside the
folder, since DPG-Bench reads every file in it.

Source: djghosh13/geneval, TencentQQGYLab/ELLA; spec t2i 8, spec evaluation 12.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dsr_jax.core.errors import DamagedFileError, EvaluationError
from dsr_jax.core.files import read_object, remove_leftovers, write_atomic, write_json
from dsr_jax.core.images import read_file
from dsr_jax.core.provenance import provenance
from dsr_jax.evaluation import dpg
from dsr_jax.parallel.processes import is_process_zero, log, wait_for_all

SEED = 42
"""Seed that the official generators take."""

Generate = Callable[[Sequence[str], np.ndarray], np.ndarray]
"""`(prompts [B], seeds uint32 [B]) -> images uint8 [B, H, W, 3]`; image i depends on prompt i and
seed i alone. An attribute `recipe` of the function, if it has one, is recorded."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of a benchmark.

    Attributes:
      number: Its index in the benchmark, from which the seeds follow.
      text: What the image is to show.
      name: Folder or file name of its images.
      metadata: GenEval's line of metadata.
    """

    number: int
    text: str
    name: str
    metadata: Mapping[str, Any] | None = None


class Layout(Protocol):
    """Files of a benchmark's images below a folder."""

    @property
    def per_prompt(self) -> int:
        """Images of each prompt."""

    def exists(self, root: Path, prompt: Prompt) -> bool:
        """Whether all images of a prompt are there and whole."""

    def save(self, root: Path, prompt: Prompt, images: np.ndarray) -> None:
        """Writes all images of a prompt, uint8 [N, H, W, 3]."""


@dataclass(frozen=True)
class GenevalLayout:
    """GenEval's folders, one per prompt."""

    per_prompt: int = 4

    def exists(self, root: Path, prompt: Prompt) -> bool:
        folder = root / prompt.name
        images = (folder / "samples" / f"{number:04d}.png" for number in range(self.per_prompt))
        return (folder / "metadata.jsonl").is_file() and all(map(_is_whole, images))

    def save(self, root: Path, prompt: Prompt, images: np.ndarray) -> None:
        for number, image in enumerate(images):
            _write_png(root / prompt.name / "samples" / f"{number:04d}.png", image)
        # Last, since it marks the prompt as complete.
        write_atomic(root / prompt.name / "metadata.jsonl", json.dumps(prompt.metadata))


@dataclass(frozen=True)
class DpgLayout:
    """DPG-Bench's files, one grid per prompt."""

    per_prompt: int = 4

    def exists(self, root: Path, prompt: Prompt) -> bool:
        return _is_whole(root / f"{prompt.name}.png")

    def save(self, root: Path, prompt: Prompt, images: np.ndarray) -> None:
        boxes = dpg.tiles(len(images), images.shape[1])
        width, height = (max(box[i] for box in boxes) for i in (2, 3))
        grid = np.zeros((height, width, images.shape[3]), np.uint8)
        for image, (left, top, right, bottom) in zip(images, boxes, strict=True):
            grid[top:bottom, left:right] = image
        _write_png(root / f"{prompt.name}.png", grid)


def _is_whole(path: Path) -> bool:
    """Whether a PNG file is there, with the checksums that it was written with."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.verify()
    except FileNotFoundError:
        return False
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        log(f"{path} is damaged ({error}); it is made again")
        return False
    return True


def _write_png(path: Path, image: np.ndarray) -> None:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, file.getvalue())


def read_geneval_prompts(path: str | Path) -> list[Prompt]:
    """Reads evaluation_metadata.jsonl.

    Raises:
      EvaluationError: If the file cannot be read, or naming a line that is no prompt of GenEval.
    """
    found: list[Prompt] = []
    for number, line in read_lines(path, "evaluation_metadata.jsonl of GenEval"):
        if not isinstance(line.get("prompt"), str) or not isinstance(line.get("tag"), str):
            raise EvaluationError(
                f'line {number} of {path} lacks "prompt" or "tag"',
                "give evaluation_metadata.jsonl of GenEval",
            )
        found.append(Prompt(len(found), line["prompt"], f"{len(found):05d}", line))
    return found


def geneval_prompts(metadata: Sequence[Mapping[str, Any]]) -> list[Prompt]:
    """Returns prompts of the form of GenEval's metadata file."""
    return [Prompt(i, line["prompt"], f"{i:05d}", line) for i, line in enumerate(metadata)]


def read_dpg_prompts(folder: str | Path) -> list[Prompt]:
    """Reads the text files of a folder, one prompt each, in the order of their names.

    Raises:
      EvaluationError: If there are none, or one is empty.
    """
    remedy = "give the folder dpg_bench/prompts of ELLA"
    paths = sorted(Path(folder).glob("*.txt"))
    if not paths:
        raise EvaluationError(f"{folder} holds no prompts NAME.txt", remedy)
    found = []
    for number, path in enumerate(paths):
        text = read_file(path).decode(errors="replace").strip()
        if not text:
            raise EvaluationError(f"the prompt {path} is empty", remedy)
        # The scorer takes a file's name up to its first point as the prompt's.
        found.append(Prompt(number, text, path.name.split(".")[0]))
    return found


def read_lines(path: str | Path, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields number, from 1, and JSON object of each line that is not empty.

    Args:
      path: The file.
      what: What the file should be, for errors.

    Raises:
      EvaluationError: If it cannot be read, or naming a line that is no JSON object.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} cannot be read: {error}", f"give {what}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise EvaluationError(
                f"line {number} of {path} is no JSON: {error}", f"give {what}"
            ) from error
        if not isinstance(value, dict):
            raise EvaluationError(f"line {number} of {path} is no JSON object", f"give {what}")
        yield number, value


def image_seeds(seed: int, prompt: int, count: int) -> np.ndarray:
    """Returns the seeds of a prompt's images, uint32 [count]."""
    sequences = (np.random.SeedSequence([seed, prompt, image]) for image in range(count))
    return np.array([sequence.generate_state(1)[0] for sequence in sequences], np.uint32)


def write_images(
    root: Path,
    prompts: Sequence[Prompt],
    layout: Layout,
    generate: Generate,
    *,
    seed: int = SEED,
    batch: int = 16,
    recipe: Mapping[str, Any],
) -> int:
    """Makes the images of a benchmark that are missing; returns how many it made.

    On several processes all call `generate` with the same arguments, and process 0 writes.

    Args:
      root: Folder of the images.
      prompts: The benchmark's prompts.
      layout: Its files.
      generate: Makes a batch of images; it is always given `batch` prompts, filled up by the last.
      seed: Seed of the benchmark.
      batch: Images at a time.
      recipe: What decides the images apart from the prompts: checkpoint, sampler, guidance.

    Raises:
      EvaluationError: If the folder holds images of another recipe, or the generator returns
        another number or kind of images.
    """
    _check_recipe(
        root,
        {
            "layout": type(layout).__name__,
            "images_per_prompt": layout.per_prompt,
            "seed": seed,
            "prompts": [prompt.text for prompt in prompts],
            **recipe,
        },
    )
    todo = [prompt for prompt in prompts if not layout.exists(root, prompt)]
    # No process lists the folder while process 0 already writes.
    wait_for_all("images listed")
    jobs = [
        (prompt, image_seed)
        for prompt in todo
        for image_seed in image_seeds(seed, prompt.number, layout.per_prompt)
    ]
    made: list[np.ndarray] = []
    for first in range(0, len(jobs), batch):
        wanted = jobs[first : first + batch]
        padded = wanted + [wanted[-1]] * (batch - len(wanted))
        texts = [prompt.text for prompt, _ in padded]
        images = generate(texts, np.array([each for _, each in padded], np.uint32))
        _check_images(images, batch)
        made += list(images[: len(wanted)])
        while len(made) >= layout.per_prompt:
            images, made = np.stack(made[: layout.per_prompt]), made[layout.per_prompt :]
            prompt = todo.pop(0)
            if is_process_zero():
                layout.save(root, prompt, images)
        log(f"{first + len(wanted)} of {len(jobs)} images")
    wait_for_all("images written")
    return len(jobs)


def _check_images(images: np.ndarray, batch: int) -> None:
    """Checks what a generator returns."""
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != batch:
        raise EvaluationError(
            f"the generator returned {images.dtype.name} {list(images.shape)}",
            f"return uint8 [{batch}, H, W, 3]",
        )


def _check_recipe(root: Path, recipe: Mapping[str, Any]) -> None:
    """Writes the recipe beside the folder, or checks that it is the one there.

    Raises:
      EvaluationError: If the folder's images were made by another.
    """
    path = root.with_name(root.name + ".json")
    wanted = json.loads(json.dumps(recipe))
    if path.exists():
        remedy = f"delete {root} and {path}: the images are made again"
        stored = read_object(path, remedy).get("recipe")
        if not isinstance(stored, dict):
            raise DamagedFileError(f"{path} is damaged: it holds no recipe", remedy)
        changed = [key for key in {*stored, *wanted} if stored.get(key) != wanted.get(key)]
        if changed:
            raise EvaluationError(
                f"{root} holds images of another recipe: {', '.join(sorted(changed))} differ",
                "choose another folder, or delete this one and its .json",
            )
    elif root.is_dir() and any(root.iterdir()):
        raise EvaluationError(
            f"{root} holds files, but {path.name} beside it is missing", "choose another folder"
        )
    wait_for_all("recipe read")
    if is_process_zero():
        root.mkdir(parents=True, exist_ok=True)
        # DPG-Bench takes every file for an image.
        for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
            remove_leftovers(folder)
        if not path.exists():
            write_json(path, {"recipe": wanted, "provenance": provenance()})


def read_geneval_folder(root: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    """Returns the metadata and path of every image of a folder in GenEval's layout.

    Raises:
      EvaluationError: If there are no images, or a prompt's metadata is damaged.
    """
    metadata: list[dict[str, Any]] = []
    paths: list[Path] = []
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    for folder in sorted(path for path in folders if path.name.isdigit()):
        lines = list(read_lines(folder / "metadata.jsonl", "a folder that `write` made"))
        if len(lines) != 1:
            raise EvaluationError(
                f"{folder / 'metadata.jsonl'} has {len(lines)} lines, not one",
                "write the images again",
            )
        found = sorted(p for p in (folder / "samples").glob("*.png") if p.stem.isdigit())
        metadata += [lines[0][1]] * len(found)
        paths += found
    if not paths:
        raise EvaluationError(
            f"{root} holds no images in GenEval's layout", "name the folder that `write` made"
        )
    return metadata, paths
