"""Collects the metrics of steps into one log record."""

from collections.abc import Mapping
from typing import Any

import numpy as np

_LAST = ("param_norm", "learning_rate")
"""Metrics that are reported as they are; the others as means over the window."""


class MetricWindow:
    """Collects steps between two log records.

    Sums are float64 and kept in JSON's reach: a checkpoint inside a window carries them, so that a
    resumed run writes the very records that the uninterrupted one writes.

    Args:
      saved: Result of `to_json`, or None to start empty.
    """

    def __init__(self, saved: Mapping[str, Any] | None = None) -> None:
        self._count = int(saved["count"]) if saved else 0
        self._skipped = int(saved.get("skipped", 0)) if saved else 0
        values = saved["values"] if saved else {}
        self._values: dict[str, Any] = {
            name: np.asarray(value, np.float64) for name, value in values.items()
        }

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Adds the metrics of one step, on the host."""
        self._count += 1
        for name, value in metrics.items():
            if name == "finite":
                continue
            new = np.asarray(value, np.float64)
            self._values[name] = new if name in _LAST else self._values.get(name, 0.0) + new

    def add_skipped(self) -> None:
        """Counts a step whose batch was skipped, which has no metrics."""
        self._skipped += 1

    def flush(self) -> dict[str, float | None]:
        """Returns the record and starts anew.

        Returns:
          Scalars by name. Losses per interval of t are named "loss_t/0.25-0.50" with their sample
          counts under "count_t/0.25-0.50"; an interval without samples has the loss None.
          "skipped_steps" is there only if steps were skipped; if all were, the loss is None.
        """
        record: dict[str, float | None] = {}
        for name, value in self._values.items():
            if name not in ("bin_loss", "bin_count"):
                record[name] = float(value) if name in _LAST else float(value) / self._count
        losses = self._values.get("bin_loss", np.zeros(0))
        counts = self._values.get("bin_count", np.zeros(0))
        for index, (loss, count) in enumerate(zip(losses, counts, strict=True)):
            interval = f"{index / len(counts):.2f}-{(index + 1) / len(counts):.2f}"
            record[f"loss_t/{interval}"] = float(loss / count) if count else None
            record[f"count_t/{interval}"] = float(count)
        if self._skipped:
            record = {"loss": None, **record, "skipped_steps": float(self._skipped)}
        self._count, self._skipped, self._values = 0, 0, {}
        return record

    def to_json(self) -> dict[str, Any]:
        """Returns what has been collected since the last record."""
        values = {name: np.asarray(value).tolist() for name, value in self._values.items()}
        skipped = {"skipped": self._skipped} if self._skipped else {}
        return {"count": self._count, "values": values, **skipped}
