"""Captioned shapes: scenes, captions, splits, prompts, and batches of them."""

import numpy as np
import pytest

from dsr_jax.core.errors import DataError, PromptError
from dsr_jax.data import shapes
from dsr_jax.data.base import SourceOptions
from dsr_jax.data.pipeline import iterate_once, make_batches
from dsr_jax.data.sources import make_caption_source


def options(**more) -> SourceOptions:
    return SourceOptions(**{"image_size": 24, "channels": 3, **more})


def test_scenes_are_functions_of_the_index() -> None:
    first, second = (shapes.CaptionedShapes(options()) for _ in range(2))
    for index in (5, 3, 99_999):
        np.testing.assert_array_equal(first.image(index), second.image(index))
        assert first.caption(index) == second.caption(index)
    assert len({first.caption(index) for index in range(100)}) > 50
    large = shapes.CaptionedShapes(options(image_size=48)).image(3)
    np.testing.assert_array_equal(large[::2, ::2], first.image(3))


def test_training_never_shows_held_out_pairs() -> None:
    rng = np.random.default_rng(0)
    for held_out in (False, True):
        for _ in range(300):
            scene = shapes.make_scene(rng, held_out)
            pairs = [(item.color, item.kind) for item in scene]
            assert any(pair in shapes.HELD_OUT for pair in pairs) == held_out
            assert len({item.cell for item in scene}) == len(scene) <= 4
            if len(scene) == 2 and pairs[0] != pairs[1]:
                assert pairs[0][0] != pairs[1][0] and pairs[0][1] != pairs[1][1]


def test_captions_name_true_relations() -> None:
    left, right = (shapes.Object("red", "square", (1, column)) for column in (0, 2))
    above = shapes.Object("red", "square", (0, 2))
    rng = np.random.default_rng(0)
    assert shapes.relation(left, right, rng) == "left of"
    assert shapes.relation(right, left, rng) == "right of"
    assert shapes.relation(above, right, rng) == "above"
    assert shapes.relation(right, above, rng) == "below"
    corner = shapes.Object("red", "square", (2, 0))
    assert {shapes.relation(above, corner, rng) for _ in range(50)} == {"above", "right of"}


def test_prompts_are_of_six_tasks() -> None:
    prompts = shapes.evaluation_prompts("train", per_task=12)
    tags = [prompt["tag"] for prompt in prompts]
    assert {tag: tags.count(tag) for tag in tags} == {
        **dict.fromkeys(shapes.TASKS, 12),
        "single_object": 4,
    }
    texts = [prompt["prompt"] for prompt in prompts]
    assert len(set(texts)) == len(texts) and prompts == shapes.evaluation_prompts("train", 12)
    tokenizer = shapes.make_tokenizer()
    for prompt in prompts:
        tokenizer.encode_request(prompt["prompt"], 9, 24)
        for wanted in prompt["include"]:
            assert (wanted.get("color"), wanted["class"]) not in shapes.HELD_OUT
    held_out = shapes.evaluation_prompts("heldout", per_task=12)
    assert {prompt["tag"] for prompt in held_out} == {"colors", "color_attr"}
    for prompt in held_out:
        first = prompt["include"][0]
        assert (first["color"], first["class"]) in shapes.HELD_OUT


def test_batches_do_not_depend_on_where_a_run_resumes() -> None:
    source = make_caption_source(
        "shapes", shapes.make_tokenizer(), 9, 24, image_size=24, channels=3
    )
    whole = make_batches(source, 7, 4)
    batches = [next(whole) for _ in range(3)]
    assert {name: (a.shape, a.dtype.name) for name, a in batches[0].items()} == {
        "image": ((4, 24, 24, 3), "uint8"),
        "tokens": ((4, 24), "int32"),
        "targets": ((4, 24), "int32"),
        "index": ((4,), "int64"),
    }
    resumed = next(make_batches(source, 7, 4, start_step=2, rows=[1, 3]))
    for name, array in resumed.items():
        np.testing.assert_array_equal(array, batches[2][name][[1, 3]])
    *_, last = iterate_once(_First(source, 5), 4)
    assert last["mask"].tolist() == [True, False, False, False]
    assert (last["targets"][1:] == -100).all()


class _First:
    """The first records of a source."""

    def __init__(self, source, count) -> None:
        self._source, self._count = source, count

    def __getattr__(self, name):
        return getattr(self._source, name)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):
        return self._source[index]


def test_captioned_images_are_not_mirrored() -> None:
    source = make_caption_source(
        "shapes", shapes.make_tokenizer(), 9, 24, image_size=24, channels=3
    )
    with pytest.raises(DataError, match="captions name left and right"):
        next(make_batches(source, 7, 4, flip=True))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"image_size": 32}, "32 pixels"), ({"channels": 1}, "colors"), ({"split": "x"}, "'x'")],
)
def test_impossible_options(changes, problem) -> None:
    with pytest.raises(DataError, match=problem):
        shapes.CaptionedShapes(options(**changes))


def test_unknown_words_are_named() -> None:
    with pytest.raises(PromptError, match="'circle' of"):
        shapes.make_tokenizer().encode_request("a photo of a circle", 9, 24)
