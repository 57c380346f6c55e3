"""DPG-Bench's scores from a model's answers to its questions; the model is not part of the package.

Source: TencentQQGYLab/ELLA dpg_bench/compute_dpg_bench.py; spec evaluation 12.2.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsr_jax.core.errors import EvaluationError


@dataclass(frozen=True)
class Question:
    """One question about an image.

    Attributes:
      number: Its number within the image.
      parents: Questions that must be answered "yes" for this one to count; 0 is none.
      category: "attribute - color" and the like.
      text: The question.
    """

    number: int
    parents: tuple[int, ...]
    category: str
    text: str


def read_questions(text: str) -> dict[str, list[Question]]:
    """Reads dpg_bench.csv: the questions of each image, by its name.

    DSR-compat: the official reader drops the file's first question, so that the image it belongs to
    lacks it; published scores are of that reading.

    Raises:
      EvaluationError: If a column is missing.
    """
    rows = list(csv.DictReader(io.StringIO(text)))
    names = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
    if rows and (absent := [name for name in names if name not in rows[0]]):
        raise EvaluationError(f"the questions have no column {absent}", "give dpg_bench.csv")
    found: dict[str, dict[int, Question]] = {}
    previous = None
    for row in rows[1:]:
        item = row["item_id"]
        # An image whose rows are not together keeps its last run of rows.
        if item != previous:
            found[item] = {}
        previous, number = item, int(row["proposition_id"])
        found[item][number] = Question(
            number,
            tuple(int(parent) for parent in row["dependency"].split(",")),
            row["tuple"].split("(")[0].strip(),
            row["question_natural_language"],
        )
    return {item: list(questions.values()) for item, questions in found.items()}


def tiles(count: int, size: int) -> list[tuple[int, int, int, int]]:
    """Returns the boxes left, top, right, bottom of an image's tiles, row by row, two in a row.

    Args:
      count: Number of tiles, 1 to 4.
      size: Side of a tile in pixels.

    Raises:
      EvaluationError: If there is no such arrangement.
    """
    if not 1 <= count <= 4:
        raise EvaluationError(f"DPG-Bench has no image of {count} tiles", "choose 1 to 4")
    corners = [(size * (n % 2), size * (n // 2)) for n in range(count)]
    return [(left, top, left + size, top + size) for left, top in corners]


def score_image(
    questions: Sequence[Question], answers: Sequence[Mapping[str, str]]
) -> tuple[list[float], dict[int, float]]:
    """Returns the scores of one image's tiles, and the last tile's results by question.

    A question with a failed parent counts 0. Questions are processed in order,
    so that a failure reaches later questions only.

    Args:
      questions: Questions about the image.
      answers: Answer by question text, for each tile; only "yes" counts.

    Raises:
      EvaluationError: If a question depends on one that the image lacks.
    """
    tiles, given = [], {}
    for tile in answers:
        given = {q.number: float(tile[q.text] == "yes") for q in questions}
        scores = dict(given)
        for question in questions:
            for parent in question.parents:
                if parent and parent not in scores:
                    raise EvaluationError(
                        f"question {question.number} depends on {parent}, which the image lacks",
                        "the official scorer leaves such an image out",
                    )
                if parent and scores[parent] == 0:
                    scores[question.number] = 0.0
                    break
        tiles.append(sum(scores.values()) / len(scores))
    return tiles, given


def score_benchmark(
    questions: Mapping[str, Sequence[Question]],
    answers: Mapping[str, Sequence[Mapping[str, str]]],
) -> dict[str, Any]:
    """Scores of a set of images, in per cent.

    DSR-compat: an image that cannot be scored is left out, and categories count the raw answers of
    each image's last tile, as the official scorer does.

    Returns:
      score, per_image (fractions by tile), failed (names), l1 and l2 (by broad and fine category).
    """
    tiles: dict[str, list[float]] = {}
    failed: list[str] = []
    fine: dict[str, list[float]] = {}
    broad: dict[str, list[float]] = {}
    for item, given in answers.items():
        try:
            tiles[item], last = score_image(questions[item], given)
        except EvaluationError:
            failed.append(item)
            continue
        for question in questions[item]:
            value = last[question.number]
            fine.setdefault(question.category, []).append(value)
            broad.setdefault(question.category.split("-")[0].strip(), []).append(value)
    if not tiles:
        raise EvaluationError("none of the images could be scored", "check names and answers")
    return {
        "score": 100 * float(np.mean([np.mean(each) for each in tiles.values()])),
        "per_image": tiles,
        "failed": failed,
        "l1": {name: 100 * float(np.mean(values)) for name, values in broad.items()},
        "l2": {name: 100 * float(np.mean(values)) for name, values in fine.items()},
    }
