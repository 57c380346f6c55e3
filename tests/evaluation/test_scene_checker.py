"""The checker of rendered scenes: right on true captions, chance on others, noise, near misses."""

import numpy as np
import pytest

from dsr_jax.data import shapes
from dsr_jax.data.shapes import Object, render
from dsr_jax.evaluation.scene_checker import SceneChecker, shuffled
from tests.shapes_generator import scene_of

CHECKER = SceneChecker(shapes.PALETTE, shapes.BACKGROUND, shapes.masks(), shapes.SCENE_SIZE)


@pytest.fixture(scope="module")
def renders():
    prompts = [*shapes.evaluation_prompts("train", 30), *shapes.evaluation_prompts("heldout", 30)]
    rng = np.random.default_rng(1)
    return prompts, [render(scene_of(prompt, rng)) for prompt in prompts]


def test_renders_of_true_captions_are_all_correct(renders) -> None:
    prompts, images = renders
    found = CHECKER.score(prompts, images)
    assert found["overall"] == 1 and found["pct_correct_images"] == 1
    assert set(found["task_scores"]) == set(shapes.TASKS)
    # By chance, another prompt of one object may be true.
    assert found["shuffled"]["overall"] < 0.2


def test_training_captions_are_true_of_their_scenes() -> None:
    source = shapes.CaptionedShapes(shapes.SourceOptions(image_size=24, channels=3))
    for index in range(200):
        boxes, colors = CHECKER.detect(source.image(index))
        words = source.caption(index).replace(",", "").split()
        for kind in shapes.KINDS:
            count = len(boxes.get(kind, ()))
            named = next((n for n, name in shapes.NUMBERS.items() if name in words), 1)
            assert count == (named if kind in words or shapes.plural(kind) in words else 0)
        used = {color for each in colors.values() for color in each}
        named_colors = {word for word in words if word in shapes.PALETTE}
        assert named_colors <= used


def test_noise_and_magnification(renders) -> None:
    prompts, images = renders
    rng = np.random.default_rng(2)
    noisy = [
        np.clip(image.astype(float) + rng.normal(0, 30, image.shape), 0, 255).astype(np.uint8)
        for image in images
    ]
    assert CHECKER.score(prompts, noisy)["pct_correct_images"] > 0.97
    large = [image.repeat(2, 0).repeat(2, 1) for image in images]
    assert CHECKER.score(prompts, large)["pct_correct_images"] == 1


def test_near_misses_are_wrong() -> None:
    red, blue = (Object(color, "square", (1, 0)) for color in ("red", "blue"))
    cross = Object("red", "cross", (1, 2))
    count = {"class": "square", "count": 2}
    two = {"tag": "counting", "include": [count], "exclude": [{"class": "square", "count": 3}]}
    assert not CHECKER.is_correct(two, render((red,)))
    three = tuple(Object("red", "square", (row, 0)) for row in range(3))
    assert not CHECKER.is_correct(two, render(three)) and CHECKER.is_correct(two, render(three[:2]))
    color = {"tag": "colors", "include": [{"class": "square", "count": 1, "color": "red"}]}
    assert CHECKER.is_correct(color, render((red,)))
    assert not CHECKER.is_correct(color, render((blue,)))
    # The color must be that of the object, not of another one.
    assert not CHECKER.is_correct(color, render((blue, cross)))
    position = {
        "tag": "position",
        "include": [
            {"class": "cross", "count": 1},
            {"class": "square", "count": 1, "position": ["left of", 0]},
        ],
    }
    assert CHECKER.is_correct(position, render((red, cross)))
    moved = Object("red", "square", (1, 2)), Object("red", "cross", (1, 0))
    assert not CHECKER.is_correct(position, render(moved))
    blank = np.full((24, 24, 3), 20, np.uint8)
    assert CHECKER.detect(blank) == ({}, {})


def test_shuffling_leaves_no_prompt_with_its_own_text() -> None:
    prompts = [{"prompt": text} for text in "aabbbcd" for _ in range(2)]
    order = shuffled(prompts)
    assert sorted(p["prompt"] for p in order) == sorted(p["prompt"] for p in prompts)
    assert all(a["prompt"] != b["prompt"] for a, b in zip(order, prompts, strict=True))
