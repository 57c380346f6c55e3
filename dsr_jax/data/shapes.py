"""Rendered scenes of colored shapes with captions, which need no download.

A scene has 3 x 3 cells. It shows one object, two objects of two kinds and two colors, or two to
four equal objects. Captions name the objects, often their colors and, of two objects, often how
they are arranged. `HELD_OUT` pairs of color and kind are never shown in training.

Source: spec t2i 10.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from dsr_jax.core.errors import DataError
from dsr_jax.core.prompts import PromptTokenizer
from dsr_jax.core.tokenizers import WordTokenizer
from dsr_jax.data.base import SourceOptions
from dsr_jax.data.classes import fingerprint

CELLS, CELL_SIZE, OBJECT_SIZE = 3, 8, 7
SCENE_SIZE = CELLS * CELL_SIZE
NUM_SCENES = {"train": 100_000, "heldout": 10_000}
BACKGROUND = (20, 20, 28)
PALETTE: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (230, 40, 40),
        "green": (40, 200, 60),
        "blue": (50, 80, 240),
        "yellow": (235, 225, 50),
        "purple": (210, 60, 220),
        "cyan": (60, 220, 230),
    }
)
KINDS = ("square", "triangle", "cross", "frame")
HELD_OUT = (("red", "cross"), ("blue", "triangle"), ("yellow", "frame"))
"""Pairs of color and kind that training never shows."""
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's tasks."""

SINGLE_PROBABILITY, PAIR_PROBABILITY = 0.15, 0.65
"""Fractions of scenes with one object and with two different ones; the others repeat one."""
COLOR_PROBABILITY, RELATION_PROBABILITY = 0.7, 0.85
_SEED = 2_607


def masks() -> dict[str, np.ndarray]:
    """Returns the pixels of each kind of object, bool [7, 7]."""
    y, x = np.mgrid[:OBJECT_SIZE, :OBJECT_SIZE] - OBJECT_SIZE // 2
    return {
        "square": np.ones((OBJECT_SIZE, OBJECT_SIZE), bool),
        "triangle": 2 * np.abs(x) <= y + OBJECT_SIZE // 2,
        "cross": (np.abs(x) <= 1) | (np.abs(y) <= 1),
        "frame": np.maximum(np.abs(x), np.abs(y)) == OBJECT_SIZE // 2,
    }


def plural(kind: str) -> str:
    """Returns the plural of a kind's name."""
    return kind + ("es" if kind.endswith("s") else "s")


@dataclass(frozen=True)
class Object:
    """One object of a scene: its color, kind, and cell (row, column)."""

    color: str
    kind: str
    cell: tuple[int, int]


Scene = tuple[Object, ...]


def render(scene: Scene, image_size: int = SCENE_SIZE) -> np.ndarray:
    """Renders a scene, uint8 [image_size, image_size, 3]; the size is a multiple of 24."""
    image = np.empty((SCENE_SIZE, SCENE_SIZE, 3), np.uint8)
    image[:] = BACKGROUND
    forms = masks()
    for item in scene:
        top, left = (CELL_SIZE * index for index in item.cell)
        window = image[top : top + OBJECT_SIZE, left : left + OBJECT_SIZE]
        window[forms[item.kind]] = PALETTE[item.color]
    scale = image_size // SCENE_SIZE
    return image.repeat(scale, axis=0).repeat(scale, axis=1)


def make_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """Returns a random scene: without held-out pairs, or with one as its first object."""
    allowed = [(c, k) for c in PALETTE for k in KINDS if (c, k) not in HELD_OUT]
    first = (HELD_OUT if held_out else allowed)[
        rng.integers(len(HELD_OUT if held_out else allowed))
    ]
    cells = [(int(n) // CELLS, int(n) % CELLS) for n in rng.permutation(CELLS * CELLS)]
    layout = rng.random()
    if layout < SINGLE_PROBABILITY:
        pairs = [first]
    elif layout < SINGLE_PROBABILITY + PAIR_PROBABILITY:
        others = [pair for pair in allowed if pair[0] != first[0] and pair[1] != first[1]]
        pairs = [first, others[rng.integers(len(others))]]
    else:
        pairs = [first] * int(rng.choice(list(NUMBERS)))
    return tuple(Object(*pair, cell) for pair, cell in zip(pairs, cells, strict=False))


def relation(a: Object, b: Object, rng: np.random.Generator) -> str:
    """Returns how `a` is arranged to `b`; of two equally large distances, either one."""
    down, right = (i - j for i, j in zip(a.cell, b.cell, strict=True))
    if abs(down) > abs(right) or (abs(down) == abs(right) and rng.random() < 0.5):
        return "below" if down > 0 else "above"
    return "right of" if right > 0 else "left of"


def describe_scene(scene: Scene, rng: np.random.Generator) -> str:
    """Returns a random caption that is true of a scene."""
    colored = rng.random() < COLOR_PROBABILITY
    first = scene[0]
    if len(scene) > 1 and first.kind == scene[1].kind:
        names = [NUMBERS[len(scene)], *([first.color] if colored else []), plural(first.kind)]
        return f"a photo of {' '.join(names)}"
    a, *rest = [f"a {item.color} {item.kind}" if colored else f"a {item.kind}" for item in scene]
    if not rest:
        return f"a photo of {a}"
    related = rng.random() < RELATION_PROBABILITY
    return f"a photo of {a} {relation(scene[0], scene[1], rng) if related else 'and'} {rest[0]}"


class CaptionedShapes:
    """Rendered scenes with captions; scene and caption are functions of the index.

    Args:
      options: `image_size` is a multiple of 24; `split` is "train", or "heldout" for scenes with a
        pair of color and kind that "train" lacks.

    Raises:
      DataError: If the size, the number of channels or the split is not possible.
    """

    name = "captioned shapes"

    def __init__(self, options: SourceOptions) -> None:
        if options.image_size % SCENE_SIZE or options.image_size <= 0:
            raise DataError(
                f"scenes of {SCENE_SIZE} pixels cannot become {options.image_size} pixels",
                f"set config.data.image_size to a multiple of {SCENE_SIZE}",
            )
        if options.channels != 3:
            raise DataError("captions name colors", "set config.data.channels=3")
        if options.split not in NUM_SCENES:
            raise DataError(
                f"{self.name} has no split {options.split!r}",
                f"choose from {', '.join(NUM_SCENES)}",
            )
        self._split = options.split
        self.image_shape = options.image_shape
        self.fingerprint = fingerprint([options.split, *(self.caption(i) for i in range(100))])

    def __len__(self) -> int:
        return NUM_SCENES[self._split]

    def _read(self, index: int) -> tuple[Scene, str]:
        rng = np.random.default_rng([_SEED, list(NUM_SCENES).index(self._split), index])
        scene = make_scene(rng, held_out=self._split == "heldout")
        return scene, describe_scene(scene, rng)

    def image(self, index: int) -> np.ndarray:
        return render(self._read(index)[0], self.image_shape[0])

    def caption(self, index: int) -> str:
        return self._read(index)[1]

    def origin(self, index: int) -> str:
        return f"scene {index} of {self.name}"


def words() -> list[str]:
    """Lists the words of all captions and prompts."""
    return [
        *("a", "photo", "of", "and", "left", "right", "above", "below"),
        *NUMBERS.values(),
        *PALETTE,
        *KINDS,
        *map(plural, KINDS),
    ]


def make_tokenizer() -> PromptTokenizer:
    """Returns the tokenizer of these captions, in the plain format."""
    return PromptTokenizer(WordTokenizer(words()), format="plain")


def evaluation_prompts(split: str, per_task: int) -> list[dict[str, Any]]:
    """Returns prompts of GenEval's six tasks in its templates, as its metadata file holds them.

    Args:
      split: "train" for pairs of color and kind that training shows; "heldout" for the two tasks
        that name pairs, with pairs that it does not show.
      per_task: Largest number of prompts of a task; tasks with more are sampled.

    Returns:
      `tag`, `include`, for counting `exclude`, and `prompt` of each.
    """
    pairs = [(c, k) for c in PALETTE for k in KINDS if (c, k) not in HELD_OUT]
    found: list[dict[str, Any]] = []
    for number, task in enumerate(TASKS):
        if split == "heldout" and task not in ("colors", "color_attr"):
            continue
        every = list(_prompts_of(task, pairs, HELD_OUT if split == "heldout" else pairs))
        order = np.random.default_rng([_SEED, number]).permutation(len(every))
        found += [every[i] for i in sorted(order[:per_task])]
    return found


def _prompts_of(task: str, pairs: list[tuple[str, str]], first: Any) -> Iterator[dict[str, Any]]:
    """Yields all prompts of a task; those that name pairs start with one of `first`."""

    def prompt(text: str, *include: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"tag": task, "include": list(include), **more, "prompt": f"a photo of {text}"}

    def one(kind: str, **more: Any) -> dict[str, Any]:
        return {"class": kind, "count": 1, **more}

    ordered = [(a, b) for a in KINDS for b in KINDS if a != b]
    if task == "single_object":
        yield from (prompt(f"a {kind}", one(kind)) for kind in KINDS)
    elif task == "two_object":
        yield from (prompt(f"a {a} and a {b}", one(a), one(b)) for a, b in ordered)
    elif task == "counting":
        for kind in KINDS:
            for count, name in NUMBERS.items():
                yield prompt(
                    f"{name} {plural(kind)}",
                    {"class": kind, "count": count},
                    exclude=[{"class": kind, "count": count + 1}],
                )
    elif task == "colors":
        yield from (prompt(f"a {c} {kind}", one(kind, color=c)) for c, kind in first)
    elif task == "position":
        for a, b in ordered:
            for name in RELATIONS:
                # As in GenEval, the second condition is the object whose position is tested.
                yield prompt(f"a {a} {name} a {b}", one(b), one(a, position=[name, 0]))
    else:
        for c, kind in first:
            for d, other in pairs:
                if c != d and kind != other:
                    yield prompt(
                        f"a {c} {kind} and a {d} {other}", one(kind, color=c), one(other, color=d)
                    )
