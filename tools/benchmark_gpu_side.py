"""One side of a row of `tools/benchmark.py gpu`, ready to be timed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Side:
    """A side whose program is compiled and has run once.

    Attributes:
      call: Starts the work once.
      wait: Waits for the result of `call`.
      figures: Returns device, peak memory and what else is known of the side, as JSON values.
      results: What must agree with the other side.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], object]
    figures: Callable[[], dict[str, Any]]
    results: np.ndarray
