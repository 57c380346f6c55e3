"""GenEval's results from the boxes of a detector, which is not part of the package.

Source: djghosh13/geneval evaluate_images.py and summary_scores.py; spec evaluation 12.1.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MAX_OBJECTS = 16
MAX_OVERLAP = 1.0
"""Overlap from which the weaker of two boxes is dropped; 1 keeps all."""
POSITION_THRESHOLD = 0.1

Objects = Mapping[str, Sequence[int]]
"""Indices of the boxes that count, by class, best first."""
Colors = Callable[[str, Sequence[int]], Sequence[str]]
"""`(class, indices of its boxes) -> the color of each`."""


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Returns intersection over union of boxes x1, y1, x2, y2, whose edges belong to the box."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a[:4]) + area(*b[:4]) - shared
    return shared / union if union else 0.0


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Returns where box `a` is relative to box `b`: of "left of", "right of", "above", "below".

    A tenth of both boxes' extents is taken off the distance of their centres; a direction counts
    if it makes up more than half of the whole distance.
    """
    boxes = np.asarray([a[:4], b[:4]], np.float64).reshape(2, 2, 2)
    centres, extents = boxes.mean(axis=1), np.abs(boxes[:, 1] - boxes[:, 0])
    offset = centres[0] - centres[1]
    beyond = np.maximum(np.abs(offset) - POSITION_THRESHOLD * extents.sum(axis=0), 0)
    if (beyond < 1e-3).all():
        return set()
    dx, dy = np.sign(offset) * beyond / np.linalg.norm(offset)
    held = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in held.items() if holds}


def keep_boxes(boxes: Sequence[Sequence[float]], threshold: float) -> list[int]:
    """Returns indices of the boxes x1, y1, x2, y2, score that count, best first."""
    if not boxes:
        return []
    scores = np.asarray(boxes, np.float64)[:, 4]
    order = [int(i) for i in np.argsort(scores)[::-1] if scores[i] > threshold][:MAX_OBJECTS]
    kept: list[int] = []
    for i in order:
        if MAX_OVERLAP == 1 or all(overlap(boxes[i], boxes[k]) < MAX_OVERLAP for k in kept):
            kept.append(i)
    return kept


def is_correct(
    prompt: Mapping[str, Any], detections: Mapping[str, Sequence[Sequence[float]]], colors: Colors
) -> bool:
    """Returns whether an image shows what its prompt asks for.

    Args:
      prompt: A line of evaluation_metadata.jsonl: `tag`, `include`, perhaps `exclude`.
      detections: Boxes x1, y1, x2, y2, score by class, before any threshold.
      colors: Names the colors of boxes.
    """
    threshold = COUNTING_THRESHOLD if prompt["tag"] == "counting" else THRESHOLD
    objects = {name: keep_boxes(boxes, threshold) for name, boxes in detections.items()}
    groups: list[list[Sequence[float]] | None] = []
    for wanted in prompt.get("include", ()):
        groups.append(_find(wanted, groups, objects, detections, colors))
    surplus = any(
        len(objects.get(unwanted["class"], ())) >= unwanted["count"]
        for unwanted in prompt.get("exclude", ())
    )
    return not surplus and all(group is not None for group in groups)


def _find(
    wanted: Mapping[str, Any],
    groups: Sequence[list[Sequence[float]] | None],
    objects: Objects,
    detections: Mapping[str, Sequence[Sequence[float]]],
    colors: Colors,
) -> list[Sequence[float]] | None:
    """Returns the boxes that fulfil one condition of a prompt, None if there are none."""
    name, count = wanted["class"], wanted["count"]
    numbers = list(objects.get(name, ()))[:count]
    if len(numbers) < count:
        return None
    if "color" in wanted and list(colors(name, numbers)).count(wanted["color"]) < count:
        return None
    boxes = [detections[name][number] for number in numbers]
    if "position" in wanted:
        relation, target = wanted["position"]
        others = groups[target]
        if others is None:
            return None
        if not all(relation in relations(box, other) for box in boxes for other in others):
            return None
    return boxes


def summarize(
    tags: Sequence[str], prompts: Sequence[Any], correct: Sequence[bool]
) -> dict[str, Any]:
    """Scores of a whole set of images.

    Args:
      tags: Task of each image.
      prompts: Prompt of each image; any hashable names.
      correct: Whether each image is correct.

    Returns:
      task_scores (fraction of correct images by tag), overall (their mean), pct_correct_images,
      pct_correct_prompts (prompts with at least one correct image), n_images, n_prompts.
    """
    results = np.asarray(correct, bool)
    names = list(dict.fromkeys(tags))
    scores = {name: float(results[np.asarray(tags) == name].mean()) for name in names}
    solved: dict[Any, bool] = {}
    for prompt, result in zip(prompts, results, strict=True):
        solved[prompt] = solved.get(prompt, False) or bool(result)
    return {
        "task_scores": scores,
        "overall": float(np.mean(list(scores.values()))),
        "pct_correct_images": float(results.mean()),
        "pct_correct_prompts": float(np.mean(list(solved.values()))),
        "n_images": len(results),
        "n_prompts": len(solved),
    }
