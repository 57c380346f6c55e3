"""GenEval's and DPG-Bench's rules, and CLIPScore, on cases that can be worked out by hand."""

import numpy as np
import pytest

from dsr_jax.core.errors import EvaluationError
from dsr_jax.evaluation import clip_score, dpg, geneval

LEFT, RIGHT = [0, 40, 20, 60, 0.9], [70, 40, 90, 60, 0.8]


def test_overlap_counts_pixels():
    assert geneval.overlap([0, 0, 9, 9], [0, 0, 9, 9]) == 1
    assert geneval.overlap([0, 0, 9, 9], [10, 0, 19, 9]) == 0
    assert geneval.overlap([0, 0, 9, 9], [5, 0, 14, 9]) == pytest.approx(1 / 3)


def test_relations():
    assert geneval.relations(LEFT, RIGHT) == {"left of"}
    assert geneval.relations(RIGHT, LEFT) == {"right of"}
    assert geneval.relations([0, 0, 10, 10], [50, 50, 60, 60]) == {"left of", "above"}
    assert geneval.relations(LEFT, LEFT) == set()


@pytest.mark.parametrize(
    ("prompt", "result"),
    [
        ({"tag": "a", "include": [{"class": "cat", "count": 1}]}, True),
        ({"tag": "a", "include": [{"class": "cat", "count": 2}]}, False),
        ({"tag": "counting", "include": [{"class": "dog", "count": 1}]}, False),
        ({"tag": "a", "include": [{"class": "dog", "count": 1, "color": "red"}]}, True),
        ({"tag": "a", "include": [{"class": "dog", "count": 1, "color": "blue"}]}, False),
        ({"tag": "a", "exclude": [{"class": "cat", "count": 1}]}, False),
        ({"tag": "a", "exclude": [{"class": "cat", "count": 2}]}, True),
    ],
)
def test_whole_images(prompt, result):
    boxes = {"cat": [LEFT, [0, 0, 5, 5, 0.3]], "dog": [RIGHT]}
    assert geneval.is_correct(prompt, boxes, lambda name, numbers: ["red"] * len(numbers)) == result


@pytest.mark.parametrize(("relation", "result"), [("right of", True), ("above", False)])
def test_positions(relation, result):
    wanted = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": [relation, 0]}]
    prompt = {"tag": "position", "include": wanted}
    boxes = {"cat": [LEFT], "dog": [RIGHT]}
    assert geneval.is_correct(prompt, boxes, lambda *_: []) == result
    assert not geneval.is_correct(prompt, {"dog": [RIGHT]}, lambda *_: [])


def test_summary():
    found = geneval.summarize(["a", "a", "b"], [1, 1, 2], [True, False, False])
    assert found["task_scores"] == {"a": 0.5, "b": 0} and found["overall"] == 0.25
    assert found["pct_correct_prompts"] == 0.5 and found["n_images"] == 3


TABLE = """item_id,proposition_id,dependency,tuple,question_natural_language
one,1,0,entity - whole (x),dropped?
one,2,1,attribute - color (x),needs the dropped?
two,1,0,entity - whole (x),is it?
two,2,1,attribute - color (x),red?
two,3,"0, 2",global (x),shiny?
"""


def test_failed_parents_pass_on_downwards():
    questions = dpg.read_questions(TABLE)
    assert [len(questions[name]) for name in ("one", "two")] == [1, 3]
    good = {"is it?": "yes", "red?": "yes", "shiny?": "yes"}
    tiles, last = dpg.score_image(questions["two"], [good, good | {"is it?": "no"}])
    assert tiles == [1, 0] and last == {1: 0, 2: 1, 3: 1}
    tiles, _ = dpg.score_image(questions["two"], [good | {"shiny?": "Yes"}])
    assert tiles == [pytest.approx(2 / 3)]
    answers = {"one": [{"needs the dropped?": "yes"}], "two": [good]}
    found = dpg.score_benchmark(questions, answers)
    assert found["score"] == 100 and found["failed"] == ["one"]
    assert found["l1"] == {"entity": 100, "attribute": 100, "global": 100}
    with pytest.raises(EvaluationError, match="none of the images"):
        dpg.score_benchmark(questions, {"one": answers["one"]})
    with pytest.raises(EvaluationError, match="no column"):
        dpg.read_questions("a,b\n1,2\n")


def test_clip_score():
    images = np.array([[1.0, 0], [1, 0], [0, 2]])
    captions = np.array([[3.0, 4], [-1, 0], [0, 1]])
    np.testing.assert_allclose(clip_score.clip_score(images, captions), [1.5, 0, 2.5])
    references = np.stack([captions, -captions], axis=1)
    found = clip_score.ref_clip_score(images, captions, references)
    np.testing.assert_allclose(found, [2 * 1.5 / 2.5, 0, 5 / 3.5])
