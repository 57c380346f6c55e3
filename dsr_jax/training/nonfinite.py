"""Description of a step that is not finite: times, arrays and records that it came from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_SHOWN = 16


@dataclass(frozen=True)
class NonFiniteStep:
    """Step with a loss, gradient or parameter that is not finite.

    Attributes:
      step: Number of the step, from 1.
      values: Loss, norms and rate.
      times: Intervals of t with a loss that is not finite, as "0.25-0.50".
      largest: Name of the array with the largest gradient, with its block; "" if unknown.
      largest_norm: Its norm.
      bad_arrays: Names of the arrays whose gradients are not finite.
      records: Numbers of the batch's records in the data set; empty if unknown.
    """

    step: int
    values: Mapping[str, float]
    times: Sequence[str]
    largest: str
    largest_norm: float
    bad_arrays: Sequence[str]
    records: Sequence[int]

    def lines(self) -> list[str]:
        """Returns the description in a few lines."""
        values = ", ".join(f"{name} {value:g}" for name, value in self.values.items())
        lines = [f"step {self.step} is not finite: {values}"]
        if self.times:
            lines.append(f"losses that are not finite: t in {', '.join(self.times)}")
        if self.largest:
            lines.append(
                f"largest gradient: {self.largest}, norm {self.largest_norm:g} "
                f"({len(self.bad_arrays)} arrays with gradients that are not finite)"
            )
        if self.records:
            shown = ", ".join(map(str, self.records[:_SHOWN]))
            more = f", ... ({len(self.records)})" if len(self.records) > _SHOWN else ""
            lines.append(f"records of the batch: {shown}{more}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Returns all fields as JSON values; numbers that are not finite as text."""
        values = {**self.values, "largest_norm": self.largest_norm}
        return {
            "step": self.step,
            **{name: x if np.isfinite(x) else str(x) for name, x in values.items()},
            "times": list(self.times),
            "largest": self.largest,
            "arrays_not_finite": list(self.bad_arrays),
            "records": list(self.records),
        }


def describe_step(
    step: int,
    metrics: Mapping[str, Any],
    norms: Mapping[str, np.ndarray],
    records: Sequence[int] = (),
) -> NonFiniteStep:
    """Describes a step by its metrics.

    Args:
      step: Number of the step, from 1.
      metrics: Its metrics on the host.
      norms: Gradient norm of every array, a scalar or one per block.
      records: Numbers of the batch's records.
    """
    names = ("loss", "discriminator_loss", "grad_norm", "param_norm", "learning_rate")
    bins = np.asarray(metrics.get("bin_loss", ()), np.float64)
    flat = [
        (f"{name}, block {index[0]}" if index else name, float(norm))
        for name, array in norms.items()
        for index, norm in np.ndenumerate(np.asarray(array))
    ]
    # A gradient that is no number counts as the largest.
    largest, norm = max(
        flat, key=lambda pair: np.inf if np.isnan(pair[1]) else pair[1], default=("", 0.0)
    )
    return NonFiniteStep(
        step,
        {name: float(metrics[name]) for name in names if name in metrics},
        [
            f"{index / len(bins):.2f}-{(index + 1) / len(bins):.2f}"
            for index in np.flatnonzero(~np.isfinite(bins))
        ],
        largest,
        norm,
        [name for name, array in norms.items() if not np.isfinite(array).all()],
        records,
    )
