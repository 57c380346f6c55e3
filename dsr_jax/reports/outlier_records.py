"""Outlier statistics of a run as records of metrics.jsonl, and their heat maps."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsr_jax.reports.pictures import heat_map, tile

PREFIX = "outliers"
"""First part of the names of the metrics."""

PANELS: Mapping[str, tuple[str, str]] = {
    "norm_ratio": ("largest norm / median norm", "max"),
    "outlier_share": ("fraction of outlier tokens", "max"),
    "outlier_attention": ("attention that outliers receive", "max"),
    "register_attention": ("attention that registers receive", "max"),
    "effective_rank": ("effective rank of patch tokens", "min"),
    "neighbor_cosine": ("cosine to neighboring patches", "min"),
}
"""Statistics that are drawn: their titles, and how noise levels are combined over steps."""

_NAME = re.compile(rf"{PREFIX}/(\w+)/t([\d.]+)/block(\d+)")


class History(NamedTuple):
    """Statistics of a run over steps.

    Attributes:
      steps: Steps [S].
      times: Noise levels [N], 0 = data, 1 = noise.
      values: Statistics by name [S, N, L]; NaN where a record lacks one.
    """

    steps: tuple[int, ...]
    times: tuple[float, ...]
    values: dict[str, np.ndarray]


def to_record(
    times: Sequence[float], found: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, float]:
    """Returns statistics as metrics "outliers/NAME/tTIME/blockNN", without those that are NaN.

    Args:
      times: Noise levels [N].
      found: Statistics by block [L] for each of them.
    """
    record = {}
    for time, statistics in zip(times, found, strict=True):
        for name, values in statistics.items():
            for block, value in enumerate(values):
                if np.isfinite(value):
                    record[f"{PREFIX}/{name}/t{time:.2f}/block{block:02d}"] = float(value)
    return record


def read_history(records: Iterable[Mapping[str, Any]]) -> History | None:
    """Returns the statistics in a run's records; None if there are none.

    Args:
      records: Records of metrics.jsonl, each with "step".
    """
    numbers: dict[tuple[int, str, float, int], float] = {}
    for record in records:
        for key, value in record.items():
            if isinstance(value, (int, float)) and (match := _NAME.fullmatch(key)):
                place = (record["step"], match[1], float(match[2]), int(match[3]))
                numbers[place] = float(value)
    if not numbers:
        return None
    steps, names, times, blocks = (sorted(set(axis)) for axis in zip(*numbers, strict=True))
    shape = (len(steps), len(times), max(blocks) + 1)
    values = {name: np.full(shape, np.nan) for name in names}
    at = [{value: index for index, value in enumerate(axis)} for axis in (steps, times)]
    for (step, name, time, block), number in numbers.items():
        values[name][at[0][step], at[1][time], block] = number
    if {"norm_max", "norm_p50"} <= values.keys():
        values["norm_ratio"] = values["norm_max"] / np.maximum(values["norm_p50"], 1e-30)
    return History(tuple(steps), tuple(times), values)


def extend_history(old: History | None, new: History) -> History:
    """Returns a history with newer records.

    A run's monitor calls it with one record at a time: parsing all of them again would take longer
    with every one.

    Args:
      old: Statistics so far; those from the first new step on are dropped.
      new: Statistics to add.
    """
    if old is None:
        return new
    kept = sum(step < new.steps[0] for step in old.steps)
    old = old._replace(
        steps=old.steps[:kept], values={name: each[:kept] for name, each in old.values.items()}
    )
    steps, times = (*old.steps, *new.steps), tuple(sorted({*old.times, *new.times}))
    names = dict.fromkeys([*old.values, *new.values])
    blocks = max(each.shape[2] for part in (old, new) for each in part.values.values())
    values = {name: np.full((len(steps), len(times), blocks), np.nan) for name in names}
    for part, first in ((old, 0), (new, kept)):
        rows = range(first, first + len(part.steps))
        columns = [times.index(time) for time in part.times]
        for name, each in part.values.items():
            values[name][np.ix_(rows, columns, range(each.shape[2]))] = each
    return History(steps, times, values)


def draw_noise_maps(history: History) -> np.ndarray:
    """Returns the picture of block x noise level of the last step, uint8 [H, W, 3]."""
    panels = [
        heat_map(
            history.values[name][-1].T,
            f"step {history.steps[-1]:,}: {title}",
            ("block", _numbers(history.values[name].shape[2])),
            ("noise level t (0 data, 1 noise)", [f"{time:g}" for time in history.times]),
        )
        for name, (title, _) in PANELS.items()
        if name in history.values
    ]
    return tile(panels)


def draw_step_maps(history: History) -> np.ndarray:
    """Returns the picture of block x step, uint8 [H, W, 3]; `PANELS` combines noise levels."""
    panels = [
        heat_map(
            over_noise(history, name).T,
            f"{title}, {reduce}. over noise levels",
            ("block", _numbers(history.values[name].shape[2])),
            ("step", [f"{step:,}" for step in history.steps]),
        )
        for name, (title, reduce) in PANELS.items()
        if name in history.values
    ]
    return tile(panels)


def over_noise(history: History, name: str) -> np.ndarray:
    """Returns a statistic by step and block [S, L], combined over noise levels."""
    combine = np.fmax if PANELS[name][1] == "max" else np.fmin
    return combine.reduce(history.values[name], axis=1)


def _numbers(count: int) -> list[str]:
    return [str(index) for index in range(count)]
