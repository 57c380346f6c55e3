"""Golden cases, comparisons, and the one table of tolerances."""

import fnmatch
import functools
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

TOLERANCES: Mapping[str, float] = {
    "exact": 0.0,
    "forward": 5e-5,
    "loss": 5e-5,
    "gradient": 2e-4,
    "trajectory": 2e-4,
    "train_loss": 2e-5,
    "train_params": 2e-4,
    # With a rate of 1e-2, Adam's sign-like first step turns the rounding of a gradient near zero
    # into a whole step; the specification (denoiser 15) therefore names an absolute bound.
    "stress_params": 1e-3,
    # Given by the encoder specification (section 15).
    "encoder": 2e-4,
    # The hidden units that a case lists, which are no token: where GELU has closed all of them,
    # their norm is nothing but rounding.
    "units": 2e-4,
    # Likewise, for latents one of whose variances is zero: they are magnified 316 times.
    "roundtrip": 2e-3,
    # Truncation to bytes: rounding may move a pixel to an adjacent gray level.
    "levels": 1.0,
    # Given by the evaluation specification (section 13) and its cases' config.json.
    "resized": 1e-3,
    "net_input": 1e-5,
    "resized_moment": 1e-6,
    "inception": 1e-4,
    "inception_tap": 1e-3,
    "inception_logits": 4e-3,
    "inception_norm": 2e-4,
    "pool": 1e-3,
    "fid_from_images": 1e-4,
    "sfid_from_images": 1e-5,
    "fid_from_features": 1e-6,
    "frechet": 5e-7,
    "moments": 1e-10,
    "inception_score": 1e-5,
    "inception_score_adm": 1e-4,
    "torch_fidelity_score": 1e-6,
    "share": 0.03,
    "radii": 1e-6,
    "kid": 2e-6,
    "kid_full": 1e-6,
    "clip_score": 1e-5,
    "logic": 1e-9,
}
"""Largest relative error, float32 at highest precision; see `Check.error` for relative to what."""

PER_TOKEN = frozenset({"forward", "encoder", "trajectory", "roundtrip"})
"""Rows whose arrays hold tokens: each token's error is relative to that token's own norm. Beside an
outlier token of a hundred times the norm, the largest value of the array would hide all others."""

TOKEN_FLOOR = 1e-2
"""Smallest divisor of a token's error, as a fraction of the median norm: a token that is zero, such
as the sine of position 0, still has rounding errors."""

ABSOLUTE = frozenset(
    {
        *("stress_params", "levels"),
        *("resized", "net_input", "pool", "frechet", "inception_logits", "inception_norm"),
        *("share", "radii", "kid", "logic"),
    }
)
"""Rows that bound the difference itself."""

RUNNER_MODULES = (
    *("denoiser", "diffusion", "training", "encoder", "registers", "rae", "sit", "jit", "vae"),
    *("stage1", "inception", "evaluation", "prompts", "text_to_image"),
)


class Arrays(Mapping[str, np.ndarray]):
    """Mapping of arrays by name that records which names were read."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = dict(arrays)
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> np.ndarray:
        self._read.add(name)
        return self._arrays[name]

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def unread(self) -> list[str]:
        """Returns the sorted names of the arrays that were not read.

        Those called "neg_..." are left out: what other conventions give, for contrast.
        """
        unread = set(self._arrays) - self._read
        return sorted(name for name in unread if not name.split("/")[-1].startswith("neg_"))


@dataclass(frozen=True)
class Case:
    """Folder of golden numbers."""

    path: Path

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Sizes and settings."""
        return json.loads((self.path / "config.json").read_text())

    @functools.cached_property
    def io(self) -> Arrays:
        """Inputs and outputs; empty if the case has none."""
        path = self.path / "io.npz"
        if not path.is_file():
            return Arrays({})
        with np.load(path, allow_pickle=False) as arrays:
            return Arrays(dict(arrays))

    def weights(self, name: str = "weights") -> dict[str, np.ndarray]:
        """Returns the tensors of `<name>.safetensors`, by the original's names."""
        from safetensors.numpy import load_file

        return load_file(self.path / f"{name}.safetensors")


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
      label: Name of the compared array.
      got: Our array.
      want: The original's array.
      kind: Key of TOLERANCES.
      tolerance: Replaces the tolerance of `kind` if the case's own config.json gives one.
      axis: Axis of a token's features, for kinds in PER_TOKEN; None for -3 in images [B, C, h, w]
        and their trajectories [S, B, C, h, w], and for the last axis in other arrays.
    """

    label: str
    got: Any
    want: Any
    kind: str
    tolerance: float | None = None
    axis: int | None = None

    @property
    def limit(self) -> float:
        """Tolerance that applies."""
        return TOLERANCES[self.kind] if self.tolerance is None else self.tolerance

    @property
    def error(self) -> float:
        """Largest error; infinite if shapes differ or a value is not finite.

        Relative to each token's norm for kinds in PER_TOKEN, absolute for kinds in ABSOLUTE, else
        relative to the reference's largest magnitude.
        """
        got, want = (np.asarray(array).astype(np.float64) for array in (self.got, self.want))
        if got.shape != want.shape:
            return float("inf")
        if not want.size:
            return 0.0
        if self.kind in PER_TOKEN and want.ndim >= 2:
            axis = (-3 if want.ndim > 3 else -1) if self.axis is None else self.axis
            error = _token_error(got, want, axis)
        else:
            scale = 0.0 if self.kind in ABSOLUTE else np.max(np.abs(want))
            error = float(np.max(np.abs(got - want)) / (scale or 1.0))
        return error if np.isfinite(error) else float("inf")

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit."""
        return self.error <= self.limit


def _token_error(got: np.ndarray, want: np.ndarray, axis: int) -> float:
    """Returns the largest ratio of a token's error to its norm."""
    errors, norms = (np.linalg.norm(x, axis=axis) for x in (got - want, want))
    floor = TOKEN_FLOOR * np.median(norms)
    return float(np.max(errors / np.maximum(norms, floor or 1.0)))


def checks_of(
    found: Mapping[str, Any],
    wanted: Mapping[str, np.ndarray],
    kind: str,
    *,
    optional: Sequence[str] = (),
    axes: Mapping[str, int] = MappingProxyType({}),
) -> list[Check]:
    """Returns the comparisons of our arrays with the references of the same names.

    Args:
      found: Our arrays by name.
      wanted: The original's arrays by name.
      kind: Key of TOLERANCES.
      optional: Patterns of names that a case may lack.
      axes: `Check.axis` by name.

    Raises:
      KeyError: If a reference is missing that is not optional.
    """
    names = [
        name
        for name in found
        if name in wanted or not any(fnmatch.fnmatchcase(name, glob) for glob in optional)
    ]
    return [Check(name, found[name], wanted[name], kind, axis=axes.get(name)) for name in names]


Runner = Callable[[Case], Sequence[Check]]
Supports = Callable[[Mapping[str, Any]], bool]


@functools.cache
def runners() -> dict[str, tuple[Runner, Supports]]:
    """Returns all runners by pattern of folder names, each with its test of a case's config."""
    table: dict[str, tuple[Runner, Supports]] = {}
    for name in RUNNER_MODULES:
        table |= importlib.import_module(f"tools.golden.{name}").RUNNERS
    return table


def find_runner(case: Case) -> Runner | None:
    """Returns the runner with the longest matching pattern that supports the case, or None."""
    matching = [p for p in runners() if fnmatch.fnmatchcase(case.name, p)]
    for pattern in sorted(matching, key=len, reverse=True):
        run, supports = runners()[pattern]
        if supports(case.config):
            return run
    return None


def find_cases(folder: Path) -> list[Case]:
    """Returns all case folders below `folder`, sorted by name."""
    return [Case(path.parent) for path in sorted(folder.rglob("config.json"))]


@dataclass(frozen=True)
class Outcome:
    """Result of running a case.

    Attributes:
      case: The case.
      status: "pass", "FAIL" or "unsupported".
      detail: Worst error, or reason of the failure.
    """

    case: Case
    status: str
    detail: str


def run_case(case: Case) -> Outcome:
    """Runs a case; any exception counts as a failure.

    The worst comparison is the one closest to its tolerance, or farthest beyond it.
    """
    run = find_runner(case)
    if run is None:
        return Outcome(case, "unsupported", "")
    try:
        checks = list(run(case))
    except Exception as error:  # noqa: BLE001  a golden case may fail in any way
        return Outcome(case, "FAIL", f"{type(error).__name__}: {error}".splitlines()[0])
    if not checks:
        return Outcome(case, "FAIL", "nothing was compared")
    if unread := case.io.unread():
        names = ", ".join(unread[:4])
        return Outcome(case, "FAIL", f"{len(unread)} arrays of io.npz were not compared: {names}")
    worst = max(checks, key=lambda check: (not check.passed, check.error / (check.limit or 1e-30)))
    detail = f"{worst.error:.2e} of {worst.limit:.0e} ({worst.label}; {len(checks)} arrays)"
    return Outcome(case, "pass" if all(check.passed for check in checks) else "FAIL", detail)
