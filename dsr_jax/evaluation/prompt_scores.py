"""Scores of text-to-image benchmarks from the result files of their official tools.

Source: djghosh13/geneval summary_scores.py; TencentQQGYLab/ELLA compute_dpg_bench.py; spec
evaluation 12.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsr_jax.core.errors import EvaluationError
from dsr_jax.evaluation import dpg, geneval
from dsr_jax.evaluation.prompt_images import read_lines

_DETAIL = re.compile(r"(?P<path>.*), \((?P<box>\d+, \d+, \d+, \d+)\), (?P<rest>.*)")


def score_geneval_results(path: str | Path) -> dict[str, Any]:
    """Returns GenEval's scores, see `geneval.summarize`, from results.jsonl.

    A line is one image, as evaluate_images.py writes it: `tag`, `correct` and `metadata`. In place
    of `correct` it may hold `detections`, boxes by class, and `colors`, their colors by class, to
    which the rules are applied here.

    Raises:
      EvaluationError: If the file is empty, or naming a line that is none of both.
    """
    tags, prompts, correct = [], [], []
    for number, line in read_lines(path, "results.jsonl of GenEval's evaluate_images.py"):
        tag, metadata = line.get("tag"), line.get("metadata")
        if isinstance(line.get("correct"), bool) and tag and metadata:
            correct.append(line["correct"])
        elif isinstance(metadata, dict) and isinstance(line.get("detections"), dict):
            tag = metadata.get("tag")
            correct.append(_is_correct(metadata, line, f"line {number} of {path}"))
        else:
            raise EvaluationError(
                f"line {number} of {path} has neither tag, metadata and correct nor metadata and "
                "detections",
                "give results.jsonl of GenEval's evaluate_images.py",
            )
        tags.append(str(tag))
        prompts.append(str(metadata))
    if not tags:
        raise EvaluationError(f"{path} holds no results", "run evaluate_images.py again")
    return geneval.summarize(tags, prompts, correct)


def _is_correct(metadata: Mapping[str, Any], line: Mapping[str, Any], where: str) -> bool:
    colors = line.get("colors", {})
    try:
        return geneval.is_correct(
            metadata,
            line["detections"],
            lambda name, numbers: [colors[name][number] for number in numbers],
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise EvaluationError(
            f"{where} cannot be decided: {error!r}",
            'write "detections" {class: [[x1, y1, x2, y2, score]]} and "colors" {class: [name]}',
        ) from error


def score_dpg_details(details: str | Path, questions: str | Path) -> dict[str, Any]:
    """Returns DPG-Bench's scores, see `dpg.score_benchmark`, from the answers of its tool.

    Args:
      details: The file `..._detail.txt` of compute_dpg_bench.py, a line "IMAGE, (BOX), QUESTION,
        ANSWER" per tile and question.
      questions: dpg_bench.csv.

    Raises:
      EvaluationError: If a file cannot be read, or naming a line of another form.
    """
    try:
        table = _read_table(questions)
        text = Path(details).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"{details} or {questions} cannot be read: {error}", "check both paths"
        ) from error
    answers: dict[str, dict[str, dict[str, str]]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        where = f"line {number} of {details}"
        item, box, question, answer = _parse_detail(line, table, where)
        answers.setdefault(item, {}).setdefault(box, {})[question] = answer
    tiles = {item: list(boxes.values()) for item, boxes in answers.items()}
    for item, given in tiles.items():
        _check_complete(item, given, table[item], max(map(len, tiles.values())), details)
    try:
        return dpg.score_benchmark(table, tiles)
    except EvaluationError as error:
        raise EvaluationError(f"{details}: {error.problem}", error.remedy) from error


def _read_table(path: str | Path) -> dict[str, list[dpg.Question]]:
    """Reads dpg_bench.csv."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        return dpg.read_questions(text)
    except (EvaluationError, ValueError, TypeError, AttributeError, csv.Error) as error:
        problem = error.problem if isinstance(error, EvaluationError) else repr(error)
        raise EvaluationError(f"{path} is damaged: {problem}", "give dpg_bench.csv") from error


def _check_complete(
    item: str,
    tiles: Sequence[Mapping[str, str]],
    questions: Sequence[dpg.Question],
    num_tiles: int,
    details: str | Path,
) -> None:
    """Checks that an image's tiles have all answers; the tool leaves out what it cannot score.

    Raises:
      EvaluationError: If some are missing.
    """
    complete = all(question.text in tile for tile in tiles for question in questions)
    if complete and len(tiles) < num_tiles:
        try:
            dpg.score_image(questions, tiles)
        except EvaluationError:
            return
        complete = False
    if not complete:
        raise EvaluationError(
            f"{details} lacks answers about {item}", "let the official tool run to its end"
        )


def _parse_detail(
    line: str, table: Mapping[str, Sequence[dpg.Question]], where: str
) -> tuple[str, str, str, str]:
    """Returns image, tile, question and answer of a line."""
    remedy = "give the ..._detail.txt of compute_dpg_bench.py and the dpg_bench.csv that it read"
    match = _DETAIL.fullmatch(line)
    if not match:
        raise EvaluationError(f'{where} is not "IMAGE, (BOX), QUESTION, ANSWER"', remedy)
    item = re.split(r"[/\\]", match["path"])[-1].split(".")[0]
    if item not in table:
        raise EvaluationError(f"{where} is about {item}, which has no questions", remedy)
    # A question may hold commas, and so may an answer.
    for question in table[item]:
        if match["rest"].startswith(f"{question.text}, "):
            return item, match["box"], question.text, match["rest"][len(question.text) + 2 :]
    raise EvaluationError(f"{where} has none of the questions about {item}", remedy)
