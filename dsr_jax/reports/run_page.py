"""Page of one or several runs: curves, samples, outlier maps, scores, provenance."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsr_jax.core.errors import ConfigError, DsrError
from dsr_jax.core.files import read_json
from dsr_jax.core.trees import flatten_names
from dsr_jax.reports.outlier_records import draw_noise_maps, draw_step_maps, read_history
from dsr_jax.reports.page import items, line_chart, make_page, picture, step_pictures, table, text
from dsr_jax.telemetry.writers import read_metrics

MAX_POINTS = 400
"""Points of a curve, chosen evenly if a run has more records."""

MAX_STEPS = 100
"""Steps in the table of outlier statistics, chosen evenly if a run has more."""

MAX_PICTURES = 12
"""Pictures of samples per run, chosen evenly."""

CURVES = {
    "loss": "Loss",
    "grad_norm": "Gradient norm",
    "mfu": "MFU",
    "images_per_second": "Images per second",
    "learning_rate": "Learning rate",
    "param_norm": "Parameter norm",
}
"""Metrics with a curve over all runs, and their titles."""


class Run(NamedTuple):
    """Files of a run, as far as they are there.

    Attributes:
      name: Name of its folder.
      folder: The folder.
      records: Whole records of metrics.jsonl.
      config: config.json.
      starts: Entries of provenance.json, one per start.
      summary: summary.json of a complete run.
      scores: Scores by the name of their file.
    """

    name: str
    folder: Path
    records: list[dict[str, Any]]
    config: dict[str, Any]
    starts: list[dict[str, Any]]
    summary: dict[str, Any]
    scores: dict[str, dict[str, Any]]


def read_run(folder: Path) -> Run:
    """Reads a run's files, also while it is being written.

    Raises:
      ConfigError: If the folder holds no run.
    """
    config = _read(folder / "config.json")
    if not config:
        raise ConfigError(
            f"--workdir={folder} holds no run: config.json is missing or damaged",
            "name the --workdir of python -m dsr_jax.train",
        )
    scores = {
        path.name.removesuffix(".scores.json"): _read(path)
        for path in sorted((folder / "scores").glob("*.scores.json"))
    }
    return Run(
        folder.resolve().name,
        folder,
        read_metrics(folder),
        config,
        _read_starts(folder / "provenance.json"),
        _read(folder / "summary.json"),
        scores,
    )


def make_run_page(
    folders: Sequence[Path], plans: Mapping[Path, Iterable[tuple[str, str]]] | None = None
) -> str:
    """Returns the page of one or several runs.

    Args:
      folders: Their folders.
      plans: Sections of the compiled program's report, by folder of the run.

    Raises:
      ConfigError: If a folder holds no run.
    """
    runs = _with_distinct_names([read_run(folder) for folder in folders])
    sections = [("Overview", _overview(runs)), ("Curves", _curves(runs))]
    sections.append(("Loss by noise level", _grid(map(_time_bins, runs))))
    sections.append(("Samples", _grid(map(_samples, runs))))
    sections.append(("Outlier tokens", _grid(map(_outliers, runs))))
    sections.append(("Scores", _scores(runs)))
    if len(runs) > 1:
        sections.append(("Differences of the configs", _differences(runs)))
    for run in runs:
        for title, content in (plans or {}).get(run.folder, ()):
            sections.append((f"Plan of {run.name}: {title}", content))
    sections.append(("Provenance", _grid(map(_provenance, runs))))
    title = ", ".join(run.name for run in runs)
    return make_page(f"Run {title}" if len(runs) == 1 else f"Runs {title}", _filled(sections))


def _read(path: Path) -> dict[str, Any]:
    """Returns a JSON object; {} if the file is missing or not whole."""
    found = _read_any(path)
    return found if isinstance(found, dict) else {}


def _read_starts(path: Path) -> list[dict[str, Any]]:
    found = _read_any(path)
    return [start for start in found if isinstance(start, dict)] if isinstance(found, list) else []


def _read_any(path: Path) -> Any:
    """Returns JSON values; None if the file is missing or not whole."""
    try:
        return read_json(path)
    except (OSError, DsrError):
        return None


def _with_distinct_names(runs: list[Run]) -> list[Run]:
    names = [run.name for run in runs]
    return [
        run._replace(name=str(run.folder)) if names.count(run.name) > 1 else run for run in runs
    ]


def _filled(sections: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [
        (title, content or '<p class="muted">Nothing is recorded.</p>')
        for title, content in sections
    ]


def _grid(parts: Iterable[str]) -> str:
    filled = "".join(f"<div>{part}</div>" for part in parts if part)
    return f'<div class="grid">{filled}</div>' if filled else ""


def _overview(runs: Sequence[Run]) -> str:
    heads = ("run", "state", "loss", "images/s", "MFU", "denoiser", "started")
    rows = []
    for run in runs:
        step = max((record["step"] for record in run.records), default=0)
        total = _section(run, "train").get("steps", 0)
        state = "complete" if run.summary.get("steps") == total else f"step {step} of {total}"
        model, registers = _section(run, "model"), _section(run, "registers")
        network = f"{model.get('name', '')}, depth {model.get('depth', '')}"
        rows.append(
            (
                text(run.name),
                text(state),
                _last(run, "loss", ".4g"),
                _last(run, "images_per_second", ",.1f"),
                _last(run, "mfu", ".1%"),
                text(f"{network}, {registers.get('num', 0)} registers"),
                text(run.starts[0].get("time", "") if run.starts else ""),
            )
        )
    return table(heads, rows, "overview")


def _section(run: Run, name: str) -> dict[str, Any]:
    found = run.config.get(name)
    return found if isinstance(found, dict) else {}


def _last(run: Run, name: str, form: str) -> str:
    values = [y for _, y in points(run, name)]
    return format(values[-1], form) if values else ""


def points(run: Run, name: str) -> list[tuple[float, float]]:
    """Returns a metric over steps, without records in which it is missing or not finite."""
    found = [
        (float(record["step"]), float(record[name]))
        for record in run.records
        if isinstance(record.get(name), (int, float)) and math.isfinite(record[name])
    ]
    return _thin(found, MAX_POINTS)


def _thin(values: list[Any], count: int) -> list[Any]:
    """Returns at most `count` values, evenly chosen, with the first and the last."""
    if len(values) <= count:
        return values
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def _curves(runs: Sequence[Run]) -> str:
    scored = sorted(
        {
            key
            for run in runs
            for record in run.records
            for key in record
            if key in ("fid", "classifier_accuracy", "frechet_distance", "inception_score")
        }
    )
    titles = {**CURVES, **{name: name.replace("_", " ") for name in scored}}
    charts = []
    for name, title in titles.items():
        series = {run.name: found for run in runs if (found := points(run, name))}
        charts.append(line_chart(title, series) if series else "")
    return _grid(charts)


def _time_bins(run: Run) -> str:
    names = sorted({key for record in run.records for key in record if key.startswith("loss_t/")})
    series = {
        f"t {name.removeprefix('loss_t/')}": found for name in names if (found := points(run, name))
    }
    return line_chart(f"Loss by t: {run.name}", series) if series else ""


def _samples(run: Run) -> str:
    paths = _thin(sorted((run.folder / "samples").glob("step_*.png")), MAX_PICTURES)
    images = []
    for path in paths:
        step = int(re.sub(r"\D", "", path.stem) or 0)
        images.append((f"step {step:,}", path.read_bytes()))
    return step_pictures(images, f"samples {run.name}", f"Samples of {run.name}") if images else ""


def _outliers(run: Run) -> str:
    history = read_history(run.records)
    if history is None:
        return ""
    rows: list[list[Any]] = [["step", "t", "block", *history.values]]
    for i in _thin([*range(len(history.steps))], MAX_STEPS):
        step = history.steps[i]
        for j, time in enumerate(history.times):
            for block in range(next(iter(history.values.values())).shape[2]):
                numbers = [float(values[i, j, block]) for values in history.values.values()]
                shown = (float(f"{x:.6g}") if math.isfinite(x) else "" for x in numbers)
                rows.append([step, time, block, *shown])
    over_steps = f"Outlier statistics of {run.name} by block over steps"
    over_noise = f"Outlier statistics of {run.name} by block over noise levels, last step"
    return picture(
        draw_step_maps(history), f"outliers over steps {run.name}", over_steps, rows
    ) + picture(draw_noise_maps(history), f"outliers over noise {run.name}", over_noise)


def _scores(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        found = {key: x for key, x in run.summary.items() if isinstance(x, (int, float))}
        if found:
            rows += [(text(run.name), "summary", text(k), f"{x:.6g}") for k, x in found.items()]
        for name, record in run.scores.items():
            scores = record.get("scores")
            for metric, value in (scores if isinstance(scores, dict) else {}).items():
                if isinstance(value, (int, float)):
                    rows.append((text(run.name), text(name), text(metric), f"{value:.6g}"))
    return table(("run", "file", "score", "value"), rows, "scores") if rows else ""


def _differences(runs: Sequence[Run]) -> str:
    configs = [flatten_names(run.config, ".") for run in runs]
    names = sorted(set().union(*configs))
    rows = [
        (text(name), *(text(config.get(name, "")) for config in configs))
        for name in names
        if len({json.dumps(config.get(name)) for config in configs}) > 1
    ]
    return table(("key", *(text(run.name) for run in runs)), rows, "differences") if rows else ""


def _provenance(run: Run) -> str:
    """Returns a table of the starts, and all that is recorded of the last one."""
    if not run.starts:
        return ""
    names = ("time", "git_revision", "num_processes", "num_devices", "device_kind")
    rows = (
        (str(number), *(text(start.get(name, "")) for name in names))
        for number, start in enumerate(run.starts, start=1)
    )
    heads = ("start", "time", "revision", "processes", "devices", "kind")
    lines = [f"{name}: {_shown(value)}" for name, value in run.starts[-1].items()]
    starts = table(heads, rows, f"starts {run.name}")
    return f"<h3>{text(run.name)}</h3>{starts}<p>The last start:</p>{items(lines)}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
